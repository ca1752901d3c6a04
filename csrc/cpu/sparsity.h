// Boolean masks as packed bits: packing, listing and transposing them. Entry i is bit i % 8 of byte
// i / 8.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tscnc {

// A matrix of bits in `bytes` bytes; row r begins at bit r * width. Bits behind the last row's are
// zero.
struct BitRows {
  const uint8_t* data;
  int64_t bytes;
  int64_t rows;
  int64_t width;
};

// Columns that are transposed together.
constexpr int64_t kStripColumns = 64;

// Words of a column's bits, four at a time.
inline int64_t strip_words(int64_t rows) { return (rows + 255) / 256 * 4; }

// The set bits column by column: the (width + 1,) pointers, the rows, and their places in the order
// of list_bits.
struct ColumnList {
  int32_t* pointers;
  int32_t* rows;
  int32_t* permutation;
};

TSCNC_PER_ISA(
    // Packs `count` entries, each a byte that is zero or not.
    void pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits);
    // How many of the buffer's bits are set.
    int64_t count_bits(const uint8_t* bits, int64_t bytes);
    // pointers[r + 1]: how many bits are set in rows 0 to r.
    void count_rows(const BitRows& bits, int64_t* pointers);
    // Column by column of each row where the bits are set, `kept` in all.
    void list_bits(const BitRows& bits, int64_t kept, int32_t* columns);
    // The same row by row of each column. `next` holds where each row begins in the order of
    // list_bits, with room for 64 * strip_words(rows) of them; `strip` has room for
    // kStripColumns * strip_words(rows).
    void list_columns(const BitRows& bits, int64_t kept, int32_t* next, uint64_t* strip,
                      const ColumnList& list);
    // For every bit that is set in `after` its rank among those of `before`, or -1.
    void map_bits(const uint8_t* before, const uint8_t* after, int64_t bytes, int64_t* places);)

}  // namespace tscnc
