// What memory safety needs from the index of a sparse pattern: tensors can be written to, and an
// entry outside the weight would be read or written where it points.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "blocked_index.h"

namespace tscnc {

// The data of `size` contiguous int32 entries on the CPU.
inline const int32_t* index_data(const char* op, const torch::stable::Tensor& index, int64_t size,
                                 const char* name) {
  STD_TORCH_CHECK(index.is_cpu() && index.is_contiguous() && index.numel() == size &&
                      index.scalar_type() == torch::headeronly::ScalarType::Int,
                  op, ": expected ", name, " to be ", size,
                  " contiguous int32 entries on the CPU, got ", index.numel(), " entries of type ",
                  torch::headeronly::toString(index.scalar_type()));
  return static_cast<const int32_t*>(index.const_data_ptr());
}

// As index_data, every entry in [0, bound).
inline const int32_t* bounded_index(const char* op, const torch::stable::Tensor& index,
                                    int64_t size, int64_t bound, const char* name) {
  const int32_t* entries = index_data(op, index, size, name);
  // The sign bit is set by an entry below 0 or above the last; without a branch this vectorises.
  const auto last = static_cast<uint32_t>(std::min<int64_t>(bound - 1, INT32_MAX));
  uint32_t outside = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto entry = static_cast<uint32_t>(entries[i]);
    outside |= entry | (last - entry);
  }
  STD_TORCH_CHECK(outside <= INT32_MAX, op, ": expected ", name, " from 0 to ", bound - 1,
                  "; the index of a pattern must not be written to");
  return entries;
}

// Row pointers that rise from 0 to the number of entries.
inline const int32_t* pointer_data(const char* op, const torch::stable::Tensor& pointers,
                                   int64_t entries, const char* name) {
  const int64_t rows = pointers.numel() - 1;
  STD_TORCH_CHECK(rows >= 0, op, ": expected ", name, " with at least one entry, got none");
  const int32_t* data = index_data(op, pointers, rows + 1, name);
  uint32_t falls = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto begin = static_cast<uint32_t>(data[row]), end = static_cast<uint32_t>(data[row + 1]);
    falls |= end | (end - begin);
  }
  STD_TORCH_CHECK(data[0] == 0 && falls <= INT32_MAX && data[rows] == entries, op, ": expected ",
                  name, " that rise from 0 to ", entries,
                  ", the number of entries; the index of a pattern must not be written to");
  return data;
}

// The blocked index of a rows x width matrix. Its counts fit its offsets, so that no entry leads
// outside its kept entries; its columns cannot lead outside a panel.
inline BlockedRows blocked_index(const char* op, const torch::stable::Tensor& buffer, int64_t rows,
                                 int64_t width) {
  constexpr auto kHeader = static_cast<int64_t>(sizeof(BlockedHeader));
  STD_TORCH_CHECK(buffer.is_cpu() && buffer.is_contiguous() && buffer.numel() >= kHeader &&
                      buffer.scalar_type() == torch::headeronly::ScalarType::Byte &&
                      reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % 8 == 0,
                  op, ": expected a blocked index as contiguous uint8 entries on the CPU");
  const auto* bytes = static_cast<const uint8_t*>(buffer.const_data_ptr());
  const auto* header = reinterpret_cast<const BlockedHeader*>(bytes);
  bool good = header->magic == kBlockedMagic && header->rows == rows && header->width == width &&
              header->block_width >= 1 && header->block_width <= kBlockedColumnValues &&
              header->kept >= 0 && header->kept <= INT32_MAX &&
              buffer.numel() == blocked_bytes(rows, width, header->block_width, header->kept);
  BlockedRows index{};
  if (good) {
    index = blocked_rows(bytes);
    int64_t entry = 0;
    for (int64_t tile = 0; tile < index.tiles(); ++tile) {
      for (int64_t block = 0; block < index.blocks(); ++block) {
        good = good && index.first_entry(tile, block) == entry;
        const uint8_t* counts = index.row_counts(tile, block);
        for (int64_t row = 0; row < index.tile_rows(tile); ++row) entry += counts[row];
      }
    }
    good = good && entry == index.kept && index.offsets[index.tiles() * index.blocks()] == entry;
  }
  STD_TORCH_CHECK(good, op, ": expected the blocked index of a ", rows, " x ", width,
                  " pattern; the index of a pattern must not be written to");
  return index;
}

}  // namespace tscnc
