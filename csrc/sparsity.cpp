// Builds the index structure of a SparsityPattern from a boolean mask, and the mask back from its
// bits.
//
// Bit i of the packed mask (i % 8 of byte i / 8) is entry i of the mask in row-major order. The
// same kept entries are listed by rows and, for the transposed product, by columns; the permutation
// leads from the second order to the first.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>

#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr uint64_t kLowBits = 0x0101010101010101;

// A word whose bytes are 0 or 1: whether the same byte of `word` is non-zero.
inline uint64_t byte_flags(uint64_t word) {
  constexpr uint64_t kSeven = 0x7f7f7f7f7f7f7f7f;
  return ((((word & kSeven) + kSeven) | word) >> 7) & kLowBits;
}

// Calls visit(begin, flags) for every eight entries of mask[0 .. count), the last ones padded with
// zeros.
template <class Visit>
inline void for_each_word(const uint8_t* mask, int64_t count, const Visit& visit) {
  int64_t begin = 0;
  for (; begin + 8 <= count; begin += 8) {
    uint64_t word;
    std::memcpy(&word, mask + begin, 8);
    visit(begin, byte_flags(word));
  }
  if (begin == count) return;
  uint64_t word = 0;
  std::memcpy(&word, mask + begin, static_cast<size_t>(count - begin));
  visit(begin, byte_flags(word));
}

// Packs the mask into bits and returns the number of kept entries.
int64_t pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits) {
  int64_t kept = 0;
  for_each_word(mask, count, [&](int64_t begin, uint64_t flags) {
    // The first product's top byte is the sum of the flags; the second moves flag i to bit 56 + i.
    kept += static_cast<int64_t>((flags * kLowBits) >> 56);
    bits[begin / 8] = static_cast<uint8_t>((flags * 0x0102040810204080) >> 56);
  });
  return kept;
}

Tensor new_index(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Int);
}

using Pattern = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Pattern sparsity_build(const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 2 && mask.is_contiguous() &&
                      mask.scalar_type() == ScalarType::Bool,
                  "sparsity_build: expected a contiguous 2-d boolean CPU mask");
  const int64_t rows = mask.size(0), width = mask.size(1);
  const auto* data = static_cast<const uint8_t*>(mask.const_data_ptr());
  Tensor bits = torch::stable::new_empty(mask, {(rows * width + 7) / 8}, ScalarType::Byte);
  const int64_t kept =
      pack_bits(data, rows * width, static_cast<uint8_t*>(bits.mutable_data_ptr()));
  STD_TORCH_CHECK(rows < std::numeric_limits<int32_t>::max() &&
                      width < std::numeric_limits<int32_t>::max() &&
                      kept <= std::numeric_limits<int32_t>::max(),
                  "sparsity_build: more than 2^31 - 1 rows, columns or kept entries");

  Tensor row_pointers = new_index(mask, rows + 1), columns = new_index(mask, kept);
  Tensor column_pointers = new_index(mask, width + 1), column_rows = new_index(mask, kept);
  Tensor permutation = new_index(mask, kept);
  auto* row_pointer = static_cast<int32_t*>(row_pointers.mutable_data_ptr());
  auto* column = static_cast<int32_t*>(columns.mutable_data_ptr());
  auto* column_pointer = static_cast<int32_t*>(column_pointers.mutable_data_ptr());
  auto* column_row = static_cast<int32_t*>(column_rows.mutable_data_ptr());
  auto* source = static_cast<int32_t*>(permutation.mutable_data_ptr());

  // column_pointer[c + 1] counts column c, then becomes the end of column c - 1, then its own end
  // as the counting sort fills it.
  std::memset(column_pointer, 0, static_cast<size_t>(width + 1) * sizeof(int32_t));
  int32_t next = 0;
  for (int64_t row = 0; row < rows; ++row) {
    row_pointer[row] = next;
    for_each_word(data + row * width, width, [&](int64_t begin, uint64_t flags) {
      for (; flags != 0; flags &= flags - 1) {
        const int64_t position = begin + __builtin_ctzll(flags) / 8;
        column[next++] = static_cast<int32_t>(position);
        ++column_pointer[position + 1];
      }
    });
  }
  row_pointer[rows] = next;
  int32_t start = 0;
  for (int64_t c = 1; c <= width; ++c) {
    const int32_t count = column_pointer[c];
    column_pointer[c] = start;
    start += count;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t j = row_pointer[row]; j < row_pointer[row + 1]; ++j) {
      const int32_t place = column_pointer[column[j] + 1]++;
      column_row[place] = static_cast<int32_t>(row);
      source[place] = j;
    }
  }
  return {bits, row_pointers, columns, column_pointers, column_rows, permutation};
}

Tensor sparsity_unpack(const Tensor& bits, int64_t rows, int64_t width) {
  const int64_t count = rows * width;
  STD_TORCH_CHECK(bits.is_cpu() && bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
                      rows >= 0 && width >= 0 && bits.numel() == (count + 7) / 8,
                  "sparsity_unpack: expected contiguous uint8 bits for ", rows, " x ", width,
                  " entries, got ", bits.numel(), " bytes");
  Tensor mask = torch::stable::new_empty(bits, {rows, width}, ScalarType::Bool);
  const auto* source = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* target = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for (int64_t begin = 0; begin < count; begin += 8) {
    // A copy of the byte in each byte of the word; byte i keeps bit i, which is then moved down.
    const uint64_t spread = (source[begin / 8] * kLowBits) & 0x8040201008040201;
    const uint64_t flags = byte_flags(spread);
    std::memcpy(target + begin, &flags, static_cast<size_t>(count - begin < 8 ? count - begin : 8));
  }
  return mask;
}

// For every kept entry of the new pattern its index among the old pattern's entries, or -1.
Tensor sparsity_mapping(const Tensor& old_pointers, const Tensor& old_columns,
                        const Tensor& new_pointers, const Tensor& new_columns) {
  constexpr char kOp[] = "sparsity_mapping";
  const int64_t kept = old_columns.numel(), wanted = new_columns.numel();
  const int32_t* old_pointer = pointer_data(kOp, old_pointers, kept, "old_pointers");
  const int32_t* old_column = index_data(kOp, old_columns, kept, "old_columns");
  const int32_t* new_pointer = pointer_data(kOp, new_pointers, wanted, "new_pointers");
  const int32_t* new_column = index_data(kOp, new_columns, wanted, "new_columns");
  const int64_t rows = old_pointers.numel() - 1;
  STD_TORCH_CHECK(new_pointers.numel() - 1 == rows, kOp,
                  ": expected patterns of as many rows, got ", rows, " and ",
                  new_pointers.numel() - 1);
  Tensor mapping = torch::stable::new_empty(new_columns, {wanted}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(mapping.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    int32_t i = old_pointer[row];
    for (int32_t j = new_pointer[row]; j < new_pointer[row + 1]; ++j) {
      while (i < old_pointer[row + 1] && old_column[i] < new_column[j]) ++i;
      const bool kept = i < old_pointer[row + 1] && old_column[i] == new_column[j];
      result[j] = kept ? i : -1;
    }
  }
  return mapping;
}

// The largest power of two up to 64 that divides both.
int64_t common_block(int64_t block, int64_t place) {
  while (place % block != 0) block /= 2;
  return block;
}

// (r, c), both powers of two up to 64: all rows change their columns at multiples of r only, and
// the kept columns of a row begin and end at multiples of c only. The first rows of a pattern
// without blocks tell that there are none.
Tensor sparsity_block_shape(const Tensor& row_pointers, const Tensor& columns, int64_t width) {
  constexpr char kOp[] = "sparsity_block_shape";
  const int64_t kept = columns.numel(), rows = row_pointers.numel() - 1;
  const int32_t* pointers = pointer_data(kOp, row_pointers, kept, "row_pointers");
  const int32_t* column = index_data(kOp, columns, kept, "columns");
  int64_t height = common_block(64, rows), across = common_block(64, width);
  for (int64_t row = 0; row < rows && height > 1; ++row) {
    const int32_t begin = pointers[row], end = pointers[row + 1];
    const bool repeated = row > 0 && end - begin == begin - pointers[row - 1] &&
                          std::memcmp(column + begin, column + pointers[row - 1],
                                      static_cast<size_t>(end - begin) * sizeof(int32_t)) == 0;
    if (repeated) continue;
    height = common_block(height, row);
    for (int32_t j = begin; j < end && across > 1; ++j) {
      if (j == begin || column[j - 1] + 1 != column[j]) across = common_block(across, column[j]);
      if (j + 1 == end || column[j] + 1 != column[j + 1]) {
        across = common_block(across, column[j] + 1);
      }
    }
  }
  Tensor shape = torch::stable::new_empty(columns, {2}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(shape.mutable_data_ptr());
  result[0] = kept > 0 ? height : 1;
  result[1] = kept > 0 && height > 1 ? across : 1;
  return shape;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "sparsity_build(Tensor mask) -> (Tensor bits, Tensor row_pointers, Tensor columns, "
      "Tensor column_pointers, Tensor column_rows, Tensor permutation)");
  m.def("sparsity_block_shape(Tensor row_pointers, Tensor columns, int width) -> Tensor");
  m.def("sparsity_unpack(Tensor bits, int rows, int width) -> Tensor");
  m.def(
      "sparsity_mapping(Tensor old_pointers, Tensor old_columns, Tensor new_pointers, "
      "Tensor new_columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("sparsity_build", TORCH_BOX(&tscnc::sparsity_build));
  m.impl("sparsity_block_shape", TORCH_BOX(&tscnc::sparsity_block_shape));
  m.impl("sparsity_unpack", TORCH_BOX(&tscnc::sparsity_unpack));
  m.impl("sparsity_mapping", TORCH_BOX(&tscnc::sparsity_mapping));
}
