// Boolean masks as packed bits: packing, listing and transposing them. Entry i is bit i % 8 of byte
// i / 8.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tscnc {

// A matrix of bits in `bytes` bytes; row r begins at bit r * stride. Bits behind the last row's are
// zero.
struct BitRows {
  const uint8_t* data;
  int64_t bytes;
  int64_t rows;
  int64_t width;
  int64_t stride;
};

TSCNC_PER_ISA(
    // Packs `count` entries, each a byte that is zero or not.
    void pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits);
    // How many of the buffer's bits are set.
    int64_t count_bits(const uint8_t* bits, int64_t bytes);
    // Column by column of each row where the bits are set, `kept` in all: the (rows + 1,) pointers
    // and the (kept,) columns.
    void list_bits(const BitRows& bits, int64_t kept, int32_t* pointers, int32_t* columns);
    // For every bit that is set in `after` its rank among those of `before`, or -1.
    void map_bits(const uint8_t* before, const uint8_t* after, int64_t bytes, int64_t* places);
    // Row c of the result, (rows + 63) / 64 words, holds column c; zeros behind its end.
    void transpose_bits(const BitRows& bits, uint64_t* transposed);)

}  // namespace tscnc
