// Packs a boolean mask into bits and builds the index of a SparsityPattern from them; what became
// of the kept entries when a mask changed.
//
// Bit i of the packed mask (i % 8 of byte i / 8) is entry i of the mask in row-major order. The
// same kept entries are listed by rows and, for the transposed product, by columns; the permutation
// leads from the second order to the first.
#include "cpu/sparsity.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "huge_pages.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// So few entries, and no more than one in so many of the mask, are sorted by column, which beats
// transposing the bits as long as the places that are written to stay in the cache.
constexpr int64_t kSortedEntries = 1 << 19, kSortedBelow = 14;

// The packed mask of a rows x width matrix.
BitRows bit_rows(const char* op, const Tensor& bits, int64_t rows, int64_t width) {
  const int64_t count = rows * width;
  STD_TORCH_CHECK(bits.is_cpu() && bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
                      rows >= 0 && width >= 0 && bits.numel() == (count + 7) / 8,
                  op, ": expected contiguous uint8 bits for ", rows, " x ", width, " entries, got ",
                  bits.numel(), " bytes");
  const auto* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  STD_TORCH_CHECK(count % 8 == 0 || data[count / 8] >> count % 8 == 0, op,
                  ": expected zeros behind the last of ", count, " bits");
  return {data, bits.numel(), rows, width};
}

// With huge pages where the system has them: to map ordinary ones takes longer than to fill them.
Tensor new_index(const Tensor& like, int64_t size) {
  Tensor index = torch::stable::new_empty(like, {size}, ScalarType::Int);
  use_huge_pages(index.mutable_data_ptr(), size * static_cast<int64_t>(sizeof(int32_t)));
  return index;
}

int32_t* index_pointer(Tensor& index) { return static_cast<int32_t*>(index.mutable_data_ptr()); }

Tensor sparsity_pack(const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "sparsity_pack: expected a contiguous boolean CPU mask");
  const int64_t count = mask.numel();
  Tensor bits = torch::stable::new_empty(mask, {(count + 7) / 8}, ScalarType::Byte);
  TSCNC_SELECT(pack_bits)(static_cast<const uint8_t*>(mask.const_data_ptr()), count,
                          static_cast<uint8_t*>(bits.mutable_data_ptr()));
  return bits;
}

// Counting sort by column.
void sort_by_column(const int32_t* row_pointers, int64_t rows, const int32_t* columns,
                    int64_t width, const ColumnList& list) {
  const int64_t kept = row_pointers[rows];
  int32_t* pointers = list.pointers;
  // pointers[c + 1] counts column c, then becomes the end of column c - 1, then its own end as the
  // entries are put in place.
  std::memset(pointers, 0, static_cast<size_t>(width + 1) * sizeof(int32_t));
  for (int64_t j = 0; j < kept; ++j) ++pointers[columns[j] + 1];
  int32_t start = 0;
  for (int64_t c = 1; c <= width; ++c) {
    const int32_t count = pointers[c];
    pointers[c] = start;
    start += count;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t j = row_pointers[row]; j < row_pointers[row + 1]; ++j) {
      const int32_t place = pointers[columns[j] + 1]++;
      list.rows[place] = static_cast<int32_t>(row);
      list.permutation[place] = j;
    }
  }
}

void list_by_column(const BitRows& bits, const int32_t* row_pointers, const int32_t* columns,
                    const ColumnList& list) {
  const int64_t rows = bits.rows, kept = row_pointers[rows];
  if (kept < kSortedEntries && kept * kSortedBelow < rows * bits.width) {
    return sort_by_column(row_pointers, rows, columns, bits.width, list);
  }
  const auto words = static_cast<size_t>(strip_words(rows));
  std::vector<int32_t> next(64 * words);
  std::copy(row_pointers, row_pointers + rows, next.begin());
  std::vector<uint64_t> strip(kStripColumns * words);
  TSCNC_SELECT(list_columns)(bits, kept, next.data(), strip.data(), list);
}

Tensor pointers_of_rows(const BitRows& matrix, const Tensor& like) {
  std::vector<int64_t> ends(static_cast<size_t>(matrix.rows + 1));
  TSCNC_SELECT(count_rows)(matrix, ends.data());
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(matrix.rows < kMost && matrix.width < kMost && ends.back() <= kMost,
                  "sparsity_build: more than 2^31 - 1 rows, columns or kept entries");
  Tensor pointers = new_index(like, matrix.rows + 1);
  std::copy(ends.begin(), ends.end(), index_pointer(pointers));
  return pointers;
}

using Indices = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Indices sparsity_build(const Tensor& bits, int64_t rows, int64_t width) {
  const BitRows matrix = bit_rows("sparsity_build", bits, rows, width);
  Tensor row_pointers = pointers_of_rows(matrix, bits);
  const int32_t* pointers = index_pointer(row_pointers);
  const int64_t kept = pointers[rows];
  Tensor columns = new_index(bits, kept), column_pointers = new_index(bits, width + 1);
  Tensor column_rows = new_index(bits, kept), permutation = new_index(bits, kept);
  TSCNC_SELECT(list_bits)(matrix, kept, index_pointer(columns));
  list_by_column(
      matrix, pointers, index_pointer(columns),
      {index_pointer(column_pointers), index_pointer(column_rows), index_pointer(permutation)});
  return {row_pointers, columns, column_pointers, column_rows, permutation};
}

Tensor sparsity_unpack(const Tensor& bits, int64_t rows, int64_t width) {
  const BitRows matrix = bit_rows("sparsity_unpack", bits, rows, width);
  const int64_t count = rows * width;
  Tensor mask = torch::stable::new_empty(bits, {rows, width}, ScalarType::Bool);
  auto* target = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for (int64_t begin = 0; begin < count; begin += 8) {
    // A copy of the byte in each byte of the word; byte i keeps bit i, which is then moved down.
    const uint64_t copies = matrix.data[begin / 8] * uint64_t{0x0101010101010101};
    const uint64_t spread = copies & 0x8040201008040201;
    const uint64_t flags = ((spread + 0x7f7f7f7f7f7f7f7f) >> 7) & 0x0101010101010101;
    std::memcpy(target + begin, &flags, static_cast<size_t>(count - begin < 8 ? count - begin : 8));
  }
  return mask;
}

// For every kept entry of the new mask its place among the old mask's entries, or -1.
Tensor sparsity_mapping(const Tensor& old_bits, const Tensor& new_bits) {
  constexpr char kOp[] = "sparsity_mapping";
  const BitRows before = bit_rows(kOp, old_bits, old_bits.numel(), 8);
  const BitRows after = bit_rows(kOp, new_bits, old_bits.numel(), 8);
  const int64_t kept = TSCNC_SELECT(count_bits)(after.data, after.bytes);
  Tensor mapping = torch::stable::new_empty(new_bits, {kept}, ScalarType::Long);
  use_huge_pages(mapping.mutable_data_ptr(), kept * static_cast<int64_t>(sizeof(int64_t)));
  TSCNC_SELECT(map_bits)(before.data, after.data, before.bytes,
                         static_cast<int64_t*>(mapping.mutable_data_ptr()));
  return mapping;
}

// Where the bits are set.
Tensor sparsity_places(const Tensor& bits) {
  constexpr char kOp[] = "sparsity_places";
  const BitRows all = bit_rows(kOp, bits, 1, bits.numel() * 8);
  STD_TORCH_CHECK(all.width < std::numeric_limits<int32_t>::max(), kOp,
                  ": more than 2^31 - 1 bits");
  const int64_t count = TSCNC_SELECT(count_bits)(all.data, all.bytes);
  Tensor places = new_index(bits, count);
  TSCNC_SELECT(list_bits)(all, count, index_pointer(places));
  return places;
}

// values[mapping], zero where the mapping is -1.
Tensor sparsity_remap(const Tensor& values, const Tensor& mapping) {
  constexpr char kOp[] = "sparsity_remap";
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous() && values.dim() == 1, kOp,
                  ": expected contiguous values on the CPU, got ", values.dim(), " dimensions");
  STD_TORCH_CHECK(mapping.is_cpu() && mapping.is_contiguous() && mapping.dim() == 1 &&
                      mapping.scalar_type() == ScalarType::Long,
                  kOp, ": expected a mapping of contiguous int64 entries on the CPU");
  const int64_t kept = values.numel(), wanted = mapping.numel();
  Tensor carried = torch::stable::new_empty(values, {wanted});
  const auto* source = static_cast<const uint8_t*>(values.const_data_ptr());
  auto* target = static_cast<uint8_t*>(carried.mutable_data_ptr());
  const auto* places = static_cast<const int64_t*>(mapping.const_data_ptr());
  const auto carry = [&](auto entry_size) {
    bool inside = true;
    for (int64_t j = 0; j < wanted && inside; ++j) {
      inside = places[j] >= -1 && places[j] < kept;
      if (!inside || places[j] < 0) {
        std::memset(target + j * entry_size, 0, entry_size);
      } else {
        std::memcpy(target + j * entry_size, source + places[j] * entry_size, entry_size);
      }
    }
    STD_TORCH_CHECK(inside, kOp, ": expected places from -1 to ", kept - 1);
  };
  // A copy of a size that the compiler knows is one instruction.
  const size_t size = values.element_size();
  if (size == 4) {
    carry(std::integral_constant<size_t, 4>{});
  } else if (size == 2) {
    carry(std::integral_constant<size_t, 2>{});
  } else {
    carry(size);
  }
  return carried;
}

// The largest power of two up to `block`, itself one, that divides both.
int64_t common_block(int64_t block, int64_t place) {
  while (place % block != 0) block /= 2;
  return block;
}

// (r, c), both powers of two up to 128: all rows change their columns at multiples of r only, and
// the kept columns of a row begin and end at multiples of c only. The first rows of a pattern
// without blocks tell that there are none.
Tensor sparsity_block_shape(const Tensor& row_pointers, const Tensor& columns, int64_t width) {
  constexpr char kOp[] = "sparsity_block_shape";
  const int64_t kept = columns.numel(), rows = row_pointers.numel() - 1;
  const int32_t* pointers = pointer_data(kOp, row_pointers, kept, "row_pointers");
  const int32_t* column = index_data(kOp, columns, kept, "columns");
  int64_t height = common_block(128, rows), across = common_block(128, width);
  for (int64_t row = 0; row < rows && height > 1; ++row) {
    const int32_t begin = pointers[row], end = pointers[row + 1];
    // Without any entry there may be no columns to point to.
    const bool repeated =
        row > 0 && end - begin == begin - pointers[row - 1] &&
        (begin == end || std::memcmp(column + begin, column + pointers[row - 1],
                                     static_cast<size_t>(end - begin) * sizeof(int32_t)) == 0);
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
  m.def("sparsity_pack(Tensor mask) -> Tensor");
  m.def(
      "sparsity_build(Tensor bits, int rows, int width) -> "
      "(Tensor row_pointers, Tensor columns, Tensor column_pointers, Tensor column_rows, "
      "Tensor permutation)");
  m.def("sparsity_block_shape(Tensor row_pointers, Tensor columns, int width) -> Tensor");
  m.def("sparsity_unpack(Tensor bits, int rows, int width) -> Tensor");
  m.def("sparsity_mapping(Tensor old_bits, Tensor new_bits) -> Tensor");
  m.def("sparsity_places(Tensor bits) -> Tensor");
  m.def("sparsity_remap(Tensor values, Tensor mapping) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("sparsity_pack", TORCH_BOX(&tscnc::sparsity_pack));
  m.impl("sparsity_build", TORCH_BOX(&tscnc::sparsity_build));
  m.impl("sparsity_block_shape", TORCH_BOX(&tscnc::sparsity_block_shape));
  m.impl("sparsity_unpack", TORCH_BOX(&tscnc::sparsity_unpack));
  m.impl("sparsity_mapping", TORCH_BOX(&tscnc::sparsity_mapping));
  m.impl("sparsity_places", TORCH_BOX(&tscnc::sparsity_places));
  m.impl("sparsity_remap", TORCH_BOX(&tscnc::sparsity_remap));
}
