// masked_linear on CUDA; Python side and formula: tscnc_kernels/ops/masked_linear.py.
#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/masked_linear.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"
#include "masked_linear_checks.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = kMaskedLinear;

// Codes of tscnc_kernels/_masked_algorithms.py. The kernels for few samples serve both codes.
enum class CudaAlgorithm : int64_t { panel = 0, small_batch = 2, spmv = 3 };

bool is_small(int64_t algorithm) {
  STD_TORCH_CHECK(algorithm == 0 || algorithm == 2 || algorithm == 3, kOp,
                  ": expected algorithm panel (0), small_batch (2) or spmv (3) on CUDA, got ",
                  algorithm);
  return static_cast<CudaAlgorithm>(algorithm) != CudaAlgorithm::panel;
}

void check_samples(const Tensor& tensor, int64_t count, int64_t width, const Tensor& like,
                   const char* name) {
  check_on_device(kOp, tensor, like, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == count && tensor.size(1) == width &&
                      tensor.scalar_type() == like.scalar_type(),
                  kOp, ": expected ", name, " to be a ", count, " x ", width,
                  " matrix of the input's dtype");
}

// The weight must live as long as what this returns.
cuda::KeptValues kept_values(const Tensor& weight, const cuda::KeptEntries& rows,
                             const Tensor& like) {
  check_on_device(kOp, weight, like, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == like.scalar_type(), kOp,
                  ": weight and input differ in dtype");
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.numel() == rows.kept && weight.is_contiguous(), kOp, ": expected ",
                    rows.kept, " contiguous values, got ", weight.numel());
    return {weight.const_data_ptr(), nullptr, false, 0, 0};
  }
  check_samples(weight, rows.rows, rows.width, like, "weight");
  return {weight.const_data_ptr(), nullptr, true, weight.stride(0), weight.stride(1)};
}

Tensor contiguous_values(const Tensor& weight) {
  const bool is_strided = weight.dim() == 1 && !weight.is_contiguous();
  return is_strided ? torch::stable::contiguous(weight) : weight;
}

cuda::SampleMatrix sample_matrix(const Tensor& tensor, const void* saved = nullptr,
                                 Activation activation = Activation::none) {
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0),
          tensor.stride(1),        saved,          activation};
}

bool is_feature_major(const Tensor& matrix) {
  return !matrix.is_contiguous() && matrix.stride(0) == 1;
}

// A row-major matrix, or its copy with the samples of a feature next to each other.
Tensor in_layout(const Tensor& matrix, bool feature_major) {
  if (!feature_major) return matrix;
  const Tensor transposed = torch::stable::transpose(matrix, 0, 1);
  return torch::stable::transpose(torch::stable::contiguous(transposed), 0, 1);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void run_product(const cuda::ProductCall& call, bool small, const Tensor& like) {
  const cudaStream_t stream = current_cuda_stream(like.get_device_index());
  if (small && cuda::small_product_fits(call)) {
    return check_cuda(cuda::launch_small_product(call, stream), kOp);
  }
  const Tensor workspace = new_workspace(like, cuda::panel_product_workspace(call));
  check_cuda(cuda::launch_panel_product(call, workspace.mutable_data_ptr(), stream), kOp);
}

// Of columns that are 16 bits wide.
cuda::KeptEntries narrow_entries(const Tensor& pointers, const Tensor& columns,
                                 const Tensor& input) {
  const int64_t rows = pointers.numel() - 1;
  check_on_device(kOp, columns, input, "columns");
  STD_TORCH_CHECK(
      rows >= 1 && columns.is_contiguous() && input.size(1) <= 1 << 16 && input.element_size() == 2,
      kOp, ": 16-bit columns are for up to 65536 features of a half type");
  return {index_on_device(kOp, pointers, input, rows + 1, "row_pointers"), nullptr, rows,
          input.size(1), columns.numel()};
}

const void* checked_bias(const std::optional<Tensor>& bias, int64_t rows, const Tensor& like) {
  if (!bias.has_value()) return nullptr;
  check_on_device(kOp, *bias, like, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->is_contiguous() && bias->numel() == rows &&
                      bias->scalar_type() == like.scalar_type(),
                  kOp, ": expected bias to be ", rows, " contiguous entries");
  return bias->const_data_ptr();
}

std::tuple<Tensor, Tensor> masked_linear_cuda(Tensor input, Tensor weight,
                                              std::optional<Tensor> bias, Tensor row_pointers,
                                              Tensor columns, int64_t activation, int64_t algorithm,
                                              bool save_preactivation, bool feature_major) {
  const bool small = is_small(algorithm);
  STD_TORCH_CHECK(input.dim() == 2, kOp, ": expected input to be a matrix, got ", input.dim(),
                  " dimensions");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DType dtype = cuda_dtype(kOp, input);
  const bool narrow = columns.scalar_type() == ScalarType::UInt16;
  const cuda::KeptEntries entries = narrow
                                        ? narrow_entries(row_pointers, columns, input)
                                        : kept_on_device(kOp, row_pointers, columns, input.size(1),
                                                         input, "row_pointers", "columns");
  const Tensor held = contiguous_values(weight);
  const int64_t count = input.size(0);
  Tensor output = torch::stable::new_empty(input, {count, entries.rows});
  Tensor preactivation =
      torch::stable::new_empty(input, {save_preactivation ? count : 0, entries.rows});
  const cuda::ProductCall call = {
      entries,
      kept_values(held, entries, input),
      sample_matrix(input),
      checked_bias(bias, entries.rows, input),
      activation_of(activation),
      output.mutable_data_ptr(),
      save_preactivation ? preactivation.mutable_data_ptr() : nullptr,
      dtype,
      narrow ? static_cast<const uint16_t*>(columns.const_data_ptr()) : nullptr};
  STD_TORCH_CHECK(!narrow || (small && cuda::small_product_fits(call)), kOp,
                  ": 16-bit columns are for few samples that fit into shared memory");
  run_product(call, small, input);
  return {in_layout(output, feature_major), in_layout(preactivation, feature_major)};
}

std::tuple<Tensor, Tensor> masked_linear_bitmap_cuda(Tensor input, Tensor values,
                                                     std::optional<Tensor> bias, Tensor bits,
                                                     Tensor starts, int64_t activation,
                                                     bool save_preactivation, bool feature_major) {
  STD_TORCH_CHECK(input.dim() == 2 && starts.dim() == 2, kOp,
                  ": expected input and starts to be matrices, got ", input.dim(), " and ",
                  starts.dim(), " dimensions");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DType dtype = cuda_dtype(kOp, input);
  const int64_t count = input.size(0), width = input.size(1), rows = starts.size(0);
  const int64_t chunk = cuda::bitmap_chunk(dtype);
  STD_TORCH_CHECK(chunk > 0, kOp, ": algorithm bitmap has no float64 kernel");
  index_on_device(kOp, starts, input, rows * ((width + chunk - 1) / chunk), "starts");
  check_on_device(kOp, values, input, "weight");
  check_on_device(kOp, bits, input, "bits");
  STD_TORCH_CHECK(
      values.dim() == 1 && values.is_contiguous() && values.scalar_type() == input.scalar_type(),
      kOp, ": expected contiguous values of the input's dtype");
  STD_TORCH_CHECK(bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
                      bits.numel() == (rows * width + 7) / 8,
                  kOp, ": expected ", (rows * width + 7) / 8, " bytes of bits, got ", bits.numel());
  if (reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 != 0) {
    values = torch::stable::clone(values);
  }
  Tensor output = torch::stable::new_empty(input, {count, rows});
  Tensor preactivation = torch::stable::new_empty(input, {save_preactivation ? count : 0, rows});
  const cuda::BitmapCall call = {static_cast<const uint8_t*>(bits.const_data_ptr()),
                                 static_cast<const int32_t*>(starts.const_data_ptr()),
                                 values.const_data_ptr(),
                                 rows,
                                 width,
                                 values.numel(),
                                 sample_matrix(input),
                                 checked_bias(bias, rows, input),
                                 activation_of(activation),
                                 output.mutable_data_ptr(),
                                 save_preactivation ? preactivation.mutable_data_ptr() : nullptr,
                                 dtype};
  STD_TORCH_CHECK(cuda::bitmap_product_fits(call), kOp,
                  ": algorithm bitmap needs a width of whole words of the mask, got ", width,
                  ", and bits aligned to 16 bytes");
  check_cuda(cuda::launch_bitmap_product(call, current_cuda_stream(input.get_device_index())), kOp);
  return {in_layout(output, feature_major), in_layout(preactivation, feature_major)};
}

Tensor weight_gradient(const cuda::KeptEntries& entries, const cuda::SampleMatrix& gradient,
                       const Tensor& input, bool is_dense, bool small, DType dtype) {
  Tensor result = is_dense ? torch::stable::new_empty(input, {entries.rows, entries.width})
                           : torch::stable::new_empty(input, {entries.kept});
  const cuda::WeightGradientCall call = {
      entries, sample_matrix(input), gradient, result.mutable_data_ptr(), is_dense, dtype};
  const cudaStream_t stream = current_cuda_stream(input.get_device_index());
  if (small && input.size(0) > 0 && cuda::small_weight_gradient_fits(call)) {
    check_cuda(cuda::launch_small_weight_gradient(call, stream), kOp);
    return result;
  }
  const Tensor workspace = new_workspace(input, cuda::weight_gradient_workspace(call));
  check_cuda(cuda::launch_weight_gradient(call, workspace.mutable_data_ptr(), stream), kOp);
  return result;
}

Tensor bias_gradient(const cuda::SampleMatrix& gradient, const Tensor& like, DType dtype) {
  Tensor result = torch::stable::new_empty(like, {gradient.width});
  const Tensor workspace = new_workspace(like, cuda::bias_gradient_workspace(gradient, dtype));
  const cudaStream_t stream = current_cuda_stream(like.get_device_index());
  check_cuda(cuda::launch_bias_gradient(gradient, result.mutable_data_ptr(), dtype,
                                        workspace.mutable_data_ptr(), stream),
             kOp);
  return result;
}

// `saved` is the output for relu and the preactivation for gelu. A gradient that is not needed
// comes back empty.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward_cuda(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, Tensor column_pointers, Tensor column_rows, Tensor permutation,
    int64_t activation, int64_t input_algorithm, int64_t weight_algorithm, bool needs_input,
    bool needs_weight, bool needs_bias) {
  const bool small_input = is_small(input_algorithm), small_weight = is_small(weight_algorithm);
  STD_TORCH_CHECK(input.dim() == 2, kOp, ": expected input to be a matrix, got ", input.dim(),
                  " dimensions");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DType dtype = cuda_dtype(kOp, input);
  const cuda::KeptEntries rows =
      kept_on_device(kOp, row_pointers, columns, input.size(1), input, "row_pointers", "columns");
  const cuda::KeptEntries transposed = kept_on_device(kOp, column_pointers, column_rows, rows.rows,
                                                      input, "column_pointers", "column_rows");
  STD_TORCH_CHECK(transposed.kept == rows.kept && transposed.rows == rows.width, kOp,
                  ": the two orders of the pattern do not agree");
  const int64_t count = input.size(0);
  check_samples(grad_output, count, rows.rows, input, "grad_output");
  const Activation act = activation_of(activation);
  const void* scaled_by = nullptr;
  if (act != Activation::none) {
    check_samples(saved, count, rows.rows, input, "saved");
    if (!saved.is_contiguous()) saved = torch::stable::contiguous(saved);
    scaled_by = saved.const_data_ptr();
  }
  const cuda::SampleMatrix gradient = sample_matrix(grad_output, scaled_by, act);
  Tensor grad_input = torch::stable::new_empty(input, {0});
  Tensor grad_weight = grad_input, grad_bias = grad_input;
  if (needs_input) {
    const Tensor held = contiguous_values(weight);
    cuda::KeptValues values = kept_values(held, rows, input);
    values.permutation = index_on_device(kOp, permutation, input, rows.kept, "permutation");
    std::swap(values.row_stride, values.column_stride);
    grad_input = torch::stable::new_empty(input, {count, rows.width});
    const cuda::ProductCall call = {
        transposed, values, gradient, nullptr, Activation::none, grad_input.mutable_data_ptr(),
        nullptr,    dtype};
    run_product(call, small_input, input);
    grad_input = in_layout(grad_input, is_feature_major(input));
  }
  if (needs_weight) {
    grad_weight = weight_gradient(rows, gradient, input, weight.dim() == 2, small_weight, dtype);
  }
  if (needs_bias) grad_bias = bias_gradient(gradient, input, dtype);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("masked_linear", TORCH_BOX(&tscnc::masked_linear_cuda));
  m.impl("masked_linear_bitmap", TORCH_BOX(&tscnc::masked_linear_bitmap_cuda));
  m.impl("masked_linear_backward", TORCH_BOX(&tscnc::masked_linear_backward_cuda));
}
#endif
