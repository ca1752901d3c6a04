// Batch normalisation and ReLU on CUDA; Python side and formula:
// tscnc_kernels/ops/batch_norm_relu.py.
#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "cuda/batch_norm_relu.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "batch_norm_relu";

cuda::BatchNormCall call_of(const Tensor& input, double eps, bool relu) {
  STD_TORCH_CHECK(input.dim() == 3 && input.is_contiguous(), kOp,
                  ": expected a contiguous (outer, channels, length) tensor, got ", input.dim(),
                  " dimensions");
  return {input.size(0), input.size(1), input.size(2), cuda_dtype(kOp, input),
          eps,           relu,          nullptr,       nullptr};
}

// One double per channel from a tensor of any floating dtype.
std::optional<Tensor> per_channel(const std::optional<Tensor>& tensor, const Tensor& input,
                                  const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  check_on_device(kOp, *tensor, input, name);
  STD_TORCH_CHECK(tensor->numel() == input.size(1), kOp, ": expected ", name, " of ", input.size(1),
                  " entries, got ", tensor->numel());
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Double));
}

const double* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const double*>(tensor->const_data_ptr()) : nullptr;
}

double* mutable_data(const Tensor& tensor) {
  return static_cast<double*>(tensor.mutable_data_ptr());
}

Tensor new_doubles(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}

Tensor new_workspace(const Tensor& like, const cuda::BatchNormCall& call) {
  return torch::stable::new_empty(like, {cuda::batch_norm_workspace(call)}, ScalarType::Byte);
}

// Without given statistics (training) they are the batch's. Both come back in any case.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_cuda(Tensor input, std::optional<Tensor> weight,
                                                        std::optional<Tensor> bias,
                                                        std::optional<Tensor> mean,
                                                        std::optional<Tensor> variance, double eps,
                                                        bool relu) {
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(), kOp,
                  ": expected mean and variance, or neither");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  cuda::BatchNormCall call = call_of(input, eps, relu);
  const auto weights = per_channel(weight, input, "weight");
  const auto biases = per_channel(bias, input, "bias");
  call.weight = data(weights);
  call.bias = data(biases);
  const bool is_given = mean.has_value();
  const auto means = per_channel(mean, input, "mean");
  const auto variances = per_channel(variance, input, "variance");
  const Tensor found_mean = means.has_value() ? *means : new_doubles(input, call.channels);
  const Tensor found_variance =
      variances.has_value() ? *variances : new_doubles(input, call.channels);
  const Tensor output = torch::stable::empty_like(input);
  const Tensor workspace = new_workspace(input, call);
  check_cuda(cuda::launch_batch_norm(call, input.const_data_ptr(), is_given,
                                     mutable_data(found_mean), mutable_data(found_variance),
                                     output.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                     current_cuda_stream(input.get_device_index())),
             kOp);
  return {output, is_given ? torch::stable::clone(found_mean) : found_mean,
          is_given ? torch::stable::clone(found_variance) : found_variance};
}

// The gradients of weight and bias are double; one that is not wanted comes back empty.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cuda(
    Tensor grad_output, Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
    Tensor mean, Tensor variance, double eps, bool relu, bool training, bool needs_input,
    bool needs_affine) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  cuda::BatchNormCall call = call_of(input, eps, relu);
  check_on_device(kOp, grad_output, input, "grad_output");
  STD_TORCH_CHECK(grad_output.is_contiguous() && grad_output.dim() == 3 &&
                      grad_output.size(0) == call.outer && grad_output.size(1) == call.channels &&
                      grad_output.size(2) == call.length &&
                      grad_output.scalar_type() == input.scalar_type(),
                  kOp, ": grad_output and input differ in shape, layout or dtype");
  const auto weights = per_channel(weight, input, "weight");
  const auto biases = per_channel(bias, input, "bias");
  call.weight = data(weights);
  call.bias = data(biases);
  const auto means = per_channel(mean, input, "mean");
  const auto variances = per_channel(variance, input, "variance");
  const Tensor grad_input =
      needs_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  const int64_t count = needs_affine ? call.channels : 0;
  const Tensor grad_weight = new_doubles(input, count), grad_bias = new_doubles(input, count);
  const Tensor workspace = new_workspace(input, call);
  check_cuda(cuda::launch_batch_norm_backward(
                 call, grad_output.const_data_ptr(), input.const_data_ptr(), data(means),
                 data(variances), training, needs_input ? grad_input.mutable_data_ptr() : nullptr,
                 needs_affine ? mutable_data(grad_weight) : nullptr,
                 needs_affine ? mutable_data(grad_bias) : nullptr, workspace.mutable_data_ptr(),
                 current_cuda_stream(input.get_device_index())),
             kOp);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&tscnc::batch_norm_relu_cuda));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&tscnc::batch_norm_relu_backward_cuda));
}
#endif
