// What memory safety needs from the index of a sparse pattern: tensors can be written to, and an
// entry outside the weight would be read or written where it points.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

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

// The same, every one of them in [0, bound).
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

}  // namespace tscnc
