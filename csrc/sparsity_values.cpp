// The kept entries of a matrix, and a matrix of them; Python side: tscnc_kernels/_masked_weight.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "dtype_dispatch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::stable::Tensor;

// Calls function(row, first, last) for the kept entries [first, last) of every row.
template <class Function>
void for_rows(const int32_t* pointers, int64_t rows, const Function& function) {
  const int64_t cost = rows > 0 ? pointers[rows] / rows + 1 : 1;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / cost),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) {
                                  function(row, pointers[row], pointers[row + 1]);
                                }
                              });
}

Tensor sparsity_gather(const Tensor& matrix, const Tensor& row_pointers, const Tensor& columns) {
  constexpr char kOp[] = "sparsity_gather";
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2, kOp, ": expected a CPU matrix, got ",
                  matrix.dim(), " dimensions");
  const int64_t kept = columns.numel(), rows = matrix.size(0);
  const int32_t* pointers = pointer_data(kOp, row_pointers, kept, "row_pointers");
  STD_TORCH_CHECK(row_pointers.numel() == rows + 1, kOp, ": expected ", rows,
                  " rows in the index, got ", row_pointers.numel() - 1);
  const int32_t* column = bounded_index(kOp, columns, kept, matrix.size(1), "columns");
  Tensor values = torch::stable::new_empty(matrix, {kept});
  const int64_t row_stride = matrix.stride(0), column_stride = matrix.stride(1);
  dispatch_floating(kOp, matrix.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* source = static_cast<const T*>(matrix.const_data_ptr());
    T* target = static_cast<T*>(values.mutable_data_ptr());
    for_rows(pointers, rows, [&](int64_t row, int32_t first, int32_t last) {
      const T* entries = source + row * row_stride;
      for (int32_t j = first; j < last; ++j) target[j] = entries[column[j] * column_stride];
    });
  });
  return values;
}

Tensor sparsity_scatter(const Tensor& values, const Tensor& row_pointers, const Tensor& columns,
                        int64_t width) {
  constexpr char kOp[] = "sparsity_scatter";
  const int64_t kept = columns.numel();
  STD_TORCH_CHECK(
      values.is_cpu() && values.is_contiguous() && values.dim() == 1 && values.numel() == kept, kOp,
      ": expected ", kept, " contiguous values on the CPU, got ", values.numel());
  STD_TORCH_CHECK(width >= 0, kOp, ": expected a width of at least 0, got ", width);
  const int32_t* pointers = pointer_data(kOp, row_pointers, kept, "row_pointers");
  const int32_t* column = bounded_index(kOp, columns, kept, width, "columns");
  const int64_t rows = row_pointers.numel() - 1;
  Tensor matrix = torch::stable::new_zeros(values, {rows, width});
  dispatch_floating(kOp, values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* source = static_cast<const T*>(values.const_data_ptr());
    T* target = static_cast<T*>(matrix.mutable_data_ptr());
    for_rows(pointers, rows, [&](int64_t row, int32_t first, int32_t last) {
      T* entries = target + row * width;
      for (int32_t j = first; j < last; ++j) entries[column[j]] = source[j];
    });
  });
  return matrix;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("sparsity_gather(Tensor matrix, Tensor row_pointers, Tensor columns) -> Tensor");
  m.def(
      "sparsity_scatter(Tensor values, Tensor row_pointers, Tensor columns, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("sparsity_gather", TORCH_BOX(&tscnc::sparsity_gather));
  m.impl("sparsity_scatter", TORCH_BOX(&tscnc::sparsity_scatter));
}
