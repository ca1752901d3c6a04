// Puts the index of a SparsityPattern in the order of the cache-blocked products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>

#include "blocked_index.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "sparsity_block";

// The blocked index of `columns`, which ascend in each row.
Tensor sparsity_block(const Tensor& pointers, const Tensor& columns, int64_t width) {
  const int64_t kept = columns.numel();
  const int32_t* pointer = pointer_data(kOp, pointers, kept, "pointers");
  const int32_t* column = bounded_index(kOp, columns, kept, width, "columns");
  const int64_t rows = pointers.numel() - 1;
  STD_TORCH_CHECK(rows >= 1 && width >= 1, kOp, ": expected a matrix with entries, got ", rows,
                  " x ", width);
  const BlockedHeader header{kBlockedMagic, rows, width, blocked_width(rows, width, kept), kept};
  Tensor buffer = torch::stable::new_empty(
      columns, {blocked_bytes(rows, width, header.block_width, kept)}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(buffer.mutable_data_ptr());
  std::memcpy(bytes, &header, sizeof(header));
  const BlockedRows index = blocked_rows(bytes);
  auto* offsets = const_cast<int32_t*>(index.offsets);
  auto* counts = const_cast<uint8_t*>(index.counts);
  auto* places = const_cast<uint8_t*>(index.columns);

  int32_t entry = 0;
  for (int64_t tile = 0; tile < index.tiles(); ++tile) {
    const int64_t first_row = tile * kBlockedTileRows, tile_rows = index.tile_rows(tile);
    int32_t next[kBlockedTileRows];
    std::memcpy(next, pointer + first_row, static_cast<size_t>(tile_rows) * sizeof(int32_t));
    for (int64_t block = 0; block < index.blocks(); ++block) {
      const auto first = static_cast<int32_t>(block * header.block_width);
      const auto last = static_cast<int32_t>(first + header.block_width);
      *offsets++ = entry;
      for (int64_t row = 0; row < tile_rows; ++row) {
        const int32_t begin = next[row], end = pointer[first_row + row + 1];
        int32_t j = begin;
        // Falling or repeated columns end the loop early, so that the count fits a byte.
        for (int32_t least = first; j < end && column[j] >= least && column[j] < last;
             ++j, ++entry) {
          least = column[j] + 1;
          places[entry] = static_cast<uint8_t>(column[j] - first);
        }
        next[row] = j;
        *counts++ = static_cast<uint8_t>(j - begin);
      }
    }
  }
  *offsets = entry;
  STD_TORCH_CHECK(entry == kept, kOp, ": expected columns that ascend in every row");
  return buffer;
}

// `order`, which lists entries row by row, in the order of a blocked index.
Tensor sparsity_block_order(const Tensor& buffer, const Tensor& order, int64_t rows,
                            int64_t width) {
  const BlockedRows index = blocked_index(kOp, buffer, rows, width);
  const int32_t* source = index_data(kOp, order, index.kept, "order");
  const Tensor result = torch::stable::empty_like(order);
  auto* target = static_cast<int32_t*>(result.mutable_data_ptr());
  for_each_segment(index, 0, index.tiles(),
                   [=](int64_t, int64_t, int64_t entry, int64_t place, int64_t count) {
                     std::copy_n(source + place, count, target + entry);
                   });
  return result;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("sparsity_block(Tensor pointers, Tensor columns, int width) -> Tensor");
  m.def("sparsity_block_order(Tensor buffer, Tensor order, int rows, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("sparsity_block", TORCH_BOX(&tscnc::sparsity_block));
  m.impl("sparsity_block_order", TORCH_BOX(&tscnc::sparsity_block_order));
}
