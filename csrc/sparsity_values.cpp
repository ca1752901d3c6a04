// The kept entries of a matrix, and a matrix of them; Python side: tscnc_kernels/_masked_weight.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/mask_entries.h"
#include "dtype_dispatch.h"
#include "sparse_index.h"

#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/sparsity_values.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"
#endif

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
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

template <class U>
void mask_into(const Tensor& matrix, const Tensor& bits, const Tensor& target) {
  const auto kernel = TSCNC_SELECT(mask_entries<U>);
  const auto* source = static_cast<const U*>(matrix.const_data_ptr());
  const auto* kept = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* entries = static_cast<U*>(target.mutable_data_ptr());
  const int64_t count = matrix.numel();
  torch::stable::parallel_for(0, bits.numel(), 1 << 13, [&](int64_t begin, int64_t end) {
    kernel(source, kept, begin, end, count, entries);
  });
}

void check_mask(const char* op, const Tensor& matrix, const Tensor& bits) {
  const int64_t count = matrix.numel();
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.is_contiguous() && bits.is_cpu() &&
                      bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
                      bits.numel() == (count + 7) / 8,
                  op, ": expected a contiguous CPU tensor and ", (count + 7) / 8,
                  " bytes of mask, got ", bits.numel());
}

void mask_floating(const char* op, const Tensor& matrix, const Tensor& bits, const Tensor& target) {
  check_mask(op, matrix, bits);
  dispatch_floating(op, matrix.scalar_type(), [&](auto tag) {
    constexpr size_t kSize = sizeof(typename decltype(tag)::type);
    if constexpr (kSize == 2) mask_into<uint16_t>(matrix, bits, target);
    if constexpr (kSize == 4) mask_into<uint32_t>(matrix, bits, target);
    if constexpr (kSize == 8) mask_into<uint64_t>(matrix, bits, target);
  });
}

// The matrix where the packed mask keeps it, and zero elsewhere, even where it is not finite.
Tensor sparsity_mask(const Tensor& matrix, const Tensor& bits) {
  Tensor result = torch::stable::empty_like(matrix);
  mask_floating("sparsity_mask", matrix, bits, result);
  return result;
}

// The same in place.
void sparsity_mask_in_place(const Tensor& matrix, const Tensor& bits) {
  mask_floating("sparsity_mask_", matrix, bits, matrix);
}

#ifdef TSCNC_WITH_CUDA
Tensor sparsity_gather_cuda(const Tensor& matrix, const Tensor& row_pointers,
                            const Tensor& columns) {
  constexpr char kOp[] = "sparsity_gather";
  STD_TORCH_CHECK(matrix.dim() == 2, kOp, ": expected a matrix, got ", matrix.dim(), " dimensions");
  const torch::stable::accelerator::DeviceGuard guard(matrix.get_device_index());
  const cuda::KeptEntries entries =
      kept_on_device(kOp, row_pointers, columns, matrix.size(1), matrix, "row_pointers", "columns");
  STD_TORCH_CHECK(entries.rows == matrix.size(0), kOp, ": expected ", matrix.size(0),
                  " rows in the index, got ", entries.rows);
  Tensor values = torch::stable::new_empty(matrix, {entries.kept});
  check_cuda(
      cuda::launch_gather(entries, matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1),
                          values.mutable_data_ptr(), cuda_dtype(kOp, matrix),
                          current_cuda_stream(matrix.get_device_index())),
      kOp);
  return values;
}

Tensor sparsity_scatter_cuda(const Tensor& values, const Tensor& row_pointers,
                             const Tensor& columns, int64_t width) {
  constexpr char kOp[] = "sparsity_scatter";
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const cuda::KeptEntries entries =
      kept_on_device(kOp, row_pointers, columns, width, values, "row_pointers", "columns");
  STD_TORCH_CHECK(values.is_contiguous() && values.dim() == 1 && values.numel() == entries.kept,
                  kOp, ": expected ", entries.kept, " contiguous values, got ", values.numel());
  STD_TORCH_CHECK(width >= 0, kOp, ": expected a width of at least 0, got ", width);
  Tensor matrix = torch::stable::new_empty(values, {entries.rows, width});
  check_cuda(
      cuda::launch_scatter(entries, values.const_data_ptr(), matrix.mutable_data_ptr(),
                           cuda_dtype(kOp, values), current_cuda_stream(values.get_device_index())),
      kOp);
  return matrix;
}

Tensor sparsity_mask_cuda(const Tensor& matrix, const Tensor& bits) {
  constexpr char kOp[] = "sparsity_mask";
  const int64_t count = matrix.numel();
  check_on_device(kOp, bits, matrix, "bits");
  STD_TORCH_CHECK(matrix.is_contiguous() && bits.is_contiguous() &&
                      bits.scalar_type() == ScalarType::Byte && bits.numel() == (count + 7) / 8,
                  kOp, ": expected a contiguous tensor and ", (count + 7) / 8,
                  " bytes of mask, got ", bits.numel());
  const torch::stable::accelerator::DeviceGuard guard(matrix.get_device_index());
  Tensor result = torch::stable::empty_like(matrix);
  check_cuda(
      cuda::launch_mask(matrix.const_data_ptr(), static_cast<const uint8_t*>(bits.const_data_ptr()),
                        count, result.mutable_data_ptr(), cuda_dtype(kOp, matrix),
                        current_cuda_stream(matrix.get_device_index())),
      kOp);
  return result;
}
#endif

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("sparsity_gather(Tensor matrix, Tensor row_pointers, Tensor columns) -> Tensor");
  m.def(
      "sparsity_scatter(Tensor values, Tensor row_pointers, Tensor columns, int width) -> Tensor");
  m.def("sparsity_mask(Tensor matrix, Tensor bits) -> Tensor");
  m.def("sparsity_mask_(Tensor(a!) matrix, Tensor bits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("sparsity_gather", TORCH_BOX(&tscnc::sparsity_gather));
  m.impl("sparsity_scatter", TORCH_BOX(&tscnc::sparsity_scatter));
  m.impl("sparsity_mask", TORCH_BOX(&tscnc::sparsity_mask));
  m.impl("sparsity_mask_", TORCH_BOX(&tscnc::sparsity_mask_in_place));
}

#ifdef TSCNC_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("sparsity_gather", TORCH_BOX(&tscnc::sparsity_gather_cuda));
  m.impl("sparsity_scatter", TORCH_BOX(&tscnc::sparsity_scatter_cuda));
  m.impl("sparsity_mask", TORCH_BOX(&tscnc::sparsity_mask_cuda));
}
#endif
