// masked_conv2d on CUDA; Python side and formula: tscnc_kernels/ops/masked_conv2d.py.
#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/masked_conv2d.h"
#include "cuda/sparsity_values.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"
#include "masked_linear_checks.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "masked_conv2d";

// The code of tscnc_kernels/_masked_algorithms.py that CUDA has.
void check_plane(int64_t algorithm) {
  STD_TORCH_CHECK(algorithm == 0, kOp, ": expected algorithm plane (0) on CUDA, got ", algorithm);
}

cuda::ConvAxis conv_axis(int64_t size, int64_t kernel, int64_t stride, int64_t before,
                         int64_t after, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1);
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0 && before >= 0 && after >= 0 &&
                      size + before + after > reach,
                  kOp, ": expected a kernel that fits the padded input");
  return {size, (size + before + after - reach - 1) / stride + 1, kernel, stride, before, dilation};
}

// Without the weight and the transposed index.
cuda::ConvCall conv_call(const Tensor& input, const Tensor& row_pointers, const Tensor& columns,
                         const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 11 && geometry[10] > 0, kOp,
                  ": expected input of 4 dimensions and 11 numbers of geometry");
  const auto& g = geometry;
  const int64_t width = input.size(1) / g[10] * g[0] * g[1];
  const cuda::KeptEntries entries =
      kept_on_device(kOp, row_pointers, columns, width, input, "row_pointers", "columns");
  STD_TORCH_CHECK(width > 0 && input.size(1) % g[10] == 0 && entries.rows % g[10] == 0, kOp,
                  ": expected channels that fit the groups and the pattern");
  return {input.size(0),
          input.size(1),
          entries.rows,
          g[10],
          conv_axis(input.size(2), g[0], g[2], g[4], g[5], g[8]),
          conv_axis(input.size(3), g[1], g[3], g[6], g[7], g[9]),
          entries,
          {},
          {},
          cuda_dtype(kOp, input)};
}

void check_fits(const cuda::ConvCall& call) {
  STD_TORCH_CHECK(cuda::conv_fits(call), kOp,
                  ": the images are too large for 32-bit offsets; use algorithm='dense'");
}

void check_results(const Tensor& tensor, const Tensor& input, const cuda::ConvCall& call,
                   const char* name) {
  check_on_device(kOp, tensor, input, name);
  STD_TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == call.images && tensor.size(1) == call.out_channels &&
          tensor.size(2) == call.height.results && tensor.size(3) == call.width.results &&
          tensor.scalar_type() == input.scalar_type(),
      kOp, ": expected ", name, " to be ", call.images, " x ", call.out_channels, " x ",
      call.height.results, " x ", call.width.results, " and of the input's dtype");
}

// The weight must be contiguous and live as long as what this returns.
cuda::KeptValues kept_values(const Tensor& weight, const cuda::KeptEntries& rows,
                             const Tensor& like) {
  check_on_device(kOp, weight, like, "weight");
  const bool is_dense = weight.dim() != 1;
  STD_TORCH_CHECK(weight.scalar_type() == like.scalar_type() &&
                      weight.numel() == (is_dense ? rows.rows * rows.width : rows.kept),
                  kOp, ": expected the weight or its ", rows.kept,
                  " values in the input's dtype, got ", weight.numel());
  return {weight.const_data_ptr(), nullptr, is_dense, rows.width, 1};
}

// Contiguous images, or their copy pixel by pixel.
Tensor in_layout(const Tensor& images, bool channels_last) {
  if (!channels_last) return images;
  const auto swapped = [](const Tensor& tensor, int64_t a, int64_t b) {
    return torch::stable::transpose(tensor, a, b);
  };
  const Tensor pixels = torch::stable::contiguous(swapped(swapped(images, 1, 3), 1, 2));
  return swapped(swapped(pixels, 1, 3), 2, 3);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

Tensor new_results(const Tensor& like, const cuda::ConvCall& call, int64_t images) {
  return torch::stable::new_empty(
      like, {images, call.out_channels, call.height.results, call.width.results});
}

std::tuple<Tensor, Tensor> masked_conv2d_cuda(Tensor input, Tensor weight,
                                              std::optional<Tensor> bias, Tensor row_pointers,
                                              Tensor columns, std::vector<int64_t> geometry,
                                              int64_t activation, int64_t algorithm,
                                              bool channels_last, bool save_preactivation) {
  check_plane(algorithm);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  cuda::ConvCall call = conv_call(input, row_pointers, columns, geometry);
  check_fits(call);
  const Tensor held = torch::stable::contiguous(weight);
  call.values = kept_values(held, call.entries, input);
  if (bias.has_value()) {
    check_on_device(kOp, *bias, input, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->is_contiguous() &&
                        bias->numel() == call.out_channels &&
                        bias->scalar_type() == input.scalar_type(),
                    kOp, ": expected bias to be ", call.out_channels, " contiguous entries");
  }
  const Tensor images = torch::stable::contiguous(input);
  const Tensor output = new_results(input, call, call.images);
  const Tensor preactivation = new_results(input, call, save_preactivation ? call.images : 0);
  const Tensor workspace = new_workspace(input, cuda::conv_product_workspace(call, false));
  check_cuda(cuda::launch_conv_product(
                 call, images.const_data_ptr(), bias.has_value() ? bias->const_data_ptr() : nullptr,
                 activation_of(activation), output.mutable_data_ptr(),
                 save_preactivation ? preactivation.mutable_data_ptr() : nullptr,
                 workspace.mutable_data_ptr(), current_cuda_stream(input.get_device_index())),
             kOp);
  return {in_layout(output, channels_last), in_layout(preactivation, channels_last)};
}

// The contiguous gradient of the activation's argument.
Tensor scaled_gradient(const Tensor& grad_output, const Tensor& saved, Activation activation,
                       DType dtype, cudaStream_t stream) {
  const Tensor gradient = torch::stable::contiguous(grad_output);
  if (activation == Activation::none) return gradient;
  const Tensor by = torch::stable::contiguous(saved);
  const Tensor result = torch::stable::empty_like(gradient);
  check_cuda(
      cuda::launch_scaled_gradient(gradient.const_data_ptr(), by.const_data_ptr(), gradient.numel(),
                                   activation, dtype, result.mutable_data_ptr(), stream),
      kOp);
  return result;
}

// In the form of the weight.
Tensor weight_gradient(const cuda::ConvCall& call, const Tensor& gradient, const Tensor& input,
                       const Tensor& weight, cudaStream_t stream) {
  const Tensor images = torch::stable::contiguous(input);
  const Tensor values = torch::stable::new_empty(input, {call.entries.kept});
  const Tensor workspace = new_workspace(input, cuda::conv_weight_gradient_workspace(call));
  check_cuda(cuda::launch_conv_weight_gradient(call, gradient.const_data_ptr(),
                                               images.const_data_ptr(), values.mutable_data_ptr(),
                                               workspace.mutable_data_ptr(), stream),
             kOp);
  if (weight.dim() == 1) return values;
  const Tensor result = torch::stable::new_empty(
      input, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  check_cuda(cuda::launch_scatter(call.entries, values.const_data_ptr(), result.mutable_data_ptr(),
                                  call.dtype, stream),
             kOp);
  return result;
}

// `saved` is the output for relu and the preactivation for gelu. A gradient that is not needed
// comes back empty.
std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward_cuda(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, Tensor column_pointers, Tensor column_rows, Tensor permutation,
    std::vector<int64_t> geometry, int64_t activation, int64_t input_algorithm,
    int64_t weight_algorithm, bool channels_last, bool needs_input, bool needs_weight,
    bool needs_bias) {
  check_plane(input_algorithm);
  check_plane(weight_algorithm);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_cuda_stream(input.get_device_index());
  cuda::ConvCall call = conv_call(input, row_pointers, columns, geometry);
  check_fits(call);
  check_results(grad_output, input, call, "grad_output");
  const Activation act = activation_of(activation);
  if (act != Activation::none) check_results(saved, input, call, "saved");
  STD_TORCH_CHECK(weight.dim() == 1 || weight.dim() == 4, kOp,
                  ": expected weight of 1 or 4 dimensions, got ", weight.dim());
  const Tensor held = torch::stable::contiguous(weight);
  call.values = kept_values(held, call.entries, input);
  const Tensor gradient = scaled_gradient(grad_output, saved, act, call.dtype, stream);
  Tensor grad_input = torch::stable::new_empty(input, {0});
  Tensor grad_weight = grad_input, grad_bias = grad_input;
  if (needs_input) {
    call.transposed = kept_on_device(kOp, column_pointers, column_rows, call.out_channels, input,
                                     "column_pointers", "column_rows");
    STD_TORCH_CHECK(
        call.transposed.kept == call.entries.kept && call.transposed.rows == call.entries.width,
        kOp, ": the two orders of the pattern do not agree");
    call.values.permutation =
        index_on_device(kOp, permutation, input, call.entries.kept, "permutation");
    grad_input = torch::stable::new_empty(
        input, {call.images, call.in_channels, call.height.size, call.width.size});
    const Tensor workspace = new_workspace(input, cuda::conv_product_workspace(call, true));
    check_cuda(cuda::launch_conv_input_gradient(call, gradient.const_data_ptr(),
                                                grad_input.mutable_data_ptr(),
                                                workspace.mutable_data_ptr(), stream),
               kOp);
    grad_input = in_layout(grad_input, channels_last);
  }
  if (needs_weight) grad_weight = weight_gradient(call, gradient, input, weight, stream);
  if (needs_bias) {
    grad_bias = torch::stable::new_empty(input, {call.out_channels});
    check_cuda(cuda::launch_conv_bias_gradient(call, gradient.const_data_ptr(),
                                               grad_bias.mutable_data_ptr(), stream),
               kOp);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&tscnc::masked_conv2d_cuda));
  m.impl("masked_conv2d_backward", TORCH_BOX(&tscnc::masked_conv2d_backward_cuda));
}
#endif
