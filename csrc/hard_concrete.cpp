// Hard concrete gates; Python side and formula: tscnc_kernels/ops/hard_concrete.py.
#include "cpu/hard_concrete.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "dtype_dispatch.h"

#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/hard_concrete.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"
#endif

namespace tscnc {
namespace {

using torch::stable::Tensor;

constexpr char kOp[] = "hard_concrete";
// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

void check_like(const Tensor& tensor, const Tensor& log_alpha) {
  STD_TORCH_CHECK(
      tensor.is_contiguous() && log_alpha.is_contiguous() && tensor.numel() == log_alpha.numel() &&
          tensor.scalar_type() == log_alpha.scalar_type() && tensor.device() == log_alpha.device(),
      kOp, ": expected contiguous tensors of one shape, dtype and device");
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

Tensor hard_concrete_cpu(Tensor log_alpha, std::optional<Tensor> uniform, double beta, double gamma,
                         double zeta) {
  check_like(uniform.value_or(log_alpha), log_alpha);
  Tensor gates = torch::stable::empty_like(log_alpha);
  dispatch_floating(kOp, log_alpha.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = TSCNC_SELECT(hard_concrete<T>);
    const T* a = static_cast<const T*>(log_alpha.const_data_ptr());
    const T* u = data<T>(uniform);
    T* z = static_cast<T*>(gates.mutable_data_ptr());
    torch::stable::parallel_for(0, log_alpha.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(a + begin, u ? u + begin : nullptr, z + begin, end - begin, beta, gamma, zeta);
    });
  });
  return gates;
}

Tensor hard_concrete_backward_cpu(Tensor grad_output, Tensor log_alpha,
                                  std::optional<Tensor> uniform, double beta, double gamma,
                                  double zeta) {
  check_like(uniform.value_or(log_alpha), log_alpha);
  check_like(grad_output, log_alpha);
  Tensor gradient = torch::stable::empty_like(log_alpha);
  dispatch_floating(kOp, log_alpha.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = TSCNC_SELECT(hard_concrete_backward<T>);
    const T* g = static_cast<const T*>(grad_output.const_data_ptr());
    const T* a = static_cast<const T*>(log_alpha.const_data_ptr());
    const T* u = data<T>(uniform);
    T* out = static_cast<T*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, log_alpha.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(g + begin, a + begin, u ? u + begin : nullptr, out + begin, end - begin, beta, gamma,
             zeta);
    });
  });
  return gradient;
}

#ifdef TSCNC_WITH_CUDA
cuda::GateCall gate_call(const Tensor& log_alpha, const std::optional<Tensor>& uniform, double beta,
                         double gamma, double zeta) {
  return {log_alpha.const_data_ptr(),
          uniform.has_value() ? uniform->const_data_ptr() : nullptr,
          log_alpha.numel(),
          cuda_dtype(kOp, log_alpha),
          beta,
          gamma,
          zeta};
}

Tensor hard_concrete_cuda(Tensor log_alpha, std::optional<Tensor> uniform, double beta,
                          double gamma, double zeta) {
  check_like(uniform.value_or(log_alpha), log_alpha);
  const torch::stable::accelerator::DeviceGuard guard(log_alpha.get_device_index());
  Tensor gates = torch::stable::empty_like(log_alpha);
  const cuda::GateCall call = gate_call(log_alpha, uniform, beta, gamma, zeta);
  check_cuda(cuda::launch_hard_concrete(call, gates.mutable_data_ptr(),
                                        current_cuda_stream(log_alpha.get_device_index())),
             kOp);
  return gates;
}

Tensor hard_concrete_backward_cuda(Tensor grad_output, Tensor log_alpha,
                                   std::optional<Tensor> uniform, double beta, double gamma,
                                   double zeta) {
  check_like(uniform.value_or(log_alpha), log_alpha);
  check_like(grad_output, log_alpha);
  const torch::stable::accelerator::DeviceGuard guard(log_alpha.get_device_index());
  Tensor gradient = torch::stable::empty_like(log_alpha);
  const cuda::GateCall call = gate_call(log_alpha, uniform, beta, gamma, zeta);
  check_cuda(cuda::launch_hard_concrete_backward(call, grad_output.const_data_ptr(),
                                                 gradient.mutable_data_ptr(),
                                                 current_cuda_stream(log_alpha.get_device_index())),
             kOp);
  return gradient;
}
#endif

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "hard_concrete(Tensor log_alpha, Tensor? uniform, float beta, float gamma, float zeta) -> "
      "Tensor");
  m.def(
      "hard_concrete_backward(Tensor grad_output, Tensor log_alpha, Tensor? uniform, float beta, "
      "float gamma, float zeta) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("hard_concrete", TORCH_BOX(&tscnc::hard_concrete_cpu));
  m.impl("hard_concrete_backward", TORCH_BOX(&tscnc::hard_concrete_backward_cpu));
}

#ifdef TSCNC_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("hard_concrete", TORCH_BOX(&tscnc::hard_concrete_cuda));
  m.impl("hard_concrete_backward", TORCH_BOX(&tscnc::hard_concrete_backward_cuda));
}
#endif
