// transformed_l1 over a list of tensors; Python side and formula:
// tscnc_kernels/ops/transformed_l1.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/transformed_l1.h"
#include "dtype_dispatch.h"

#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/transformed_l1.h"
#include "cuda_stream.h"
#endif

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "transformed_l1";

Tensors empty_gradients(const Tensors& tensors) {
  Tensors gradients;
  for (const Tensor& tensor : tensors) gradients.push_back(torch::stable::empty_like(tensor));
  return gradients;
}

ScalarType value_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Elements per unit of parallel work. The partial sums are added in order, so the thread count does
// not matter.
constexpr int64_t kChunk = 1 << 15;

struct Chunk {
  size_t tensor;
  int64_t begin, count;
};

std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += kChunk) {
      chunks.push_back({i, begin, std::min(kChunk, tensors[i].numel() - begin)});
    }
  }
  return chunks;
}

// The sum over all tensors if `want_value`, and scale * gradient where `gradients` is not empty.
double run_cpu(const Tensors& tensors, Tensors& gradients, double a, double scale,
               bool want_value) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  std::vector<double> partial(chunks.size(), 0.0);
  dispatch_floating(kOp, tensors[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = TSCNC_SELECT(transformed_l1<T>);
    torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Chunk& chunk = chunks[i];
        const T* input =
            static_cast<const T*>(tensors[chunk.tensor].const_data_ptr()) + chunk.begin;
        T* gradient = nullptr;
        if (!gradients.empty()) {
          gradient = static_cast<T*>(gradients[chunk.tensor].mutable_data_ptr()) + chunk.begin;
        }
        partial[i] = kernel(input, gradient, chunk.count, a, scale, want_value);
      }
    });
  });
  double total = 0;
  for (const double value : partial) total += value;
  return total;
}

Tensor scalar(const Tensors& tensors, double value) {
  return torch::stable::full({}, value, value_type(tensors[0]), std::nullopt, tensors[0].device());
}

double item(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(scalar.const_data_ptr())
             : *static_cast<const float*>(scalar.const_data_ptr());
}

void check_grad_output(const Tensor& grad_output, const Tensors& tensors) {
  STD_TORCH_CHECK(grad_output.numel() == 1 && grad_output.scalar_type() == value_type(tensors[0]) &&
                      grad_output.device() == tensors[0].device(),
                  kOp, ": expected grad_output to be a scalar of the value's dtype and device");
}

Tensor transformed_l1_cpu(Tensors tensors, double a) {
  check_list(kOp, tensors);
  Tensors no_gradients;
  return scalar(tensors, run_cpu(tensors, no_gradients, a, 1.0, true));
}

Tensors transformed_l1_backward_cpu(Tensor grad_output, Tensors tensors, double a) {
  check_list(kOp, tensors);
  check_grad_output(grad_output, tensors);
  Tensors gradients = empty_gradients(tensors);
  run_cpu(tensors, gradients, a, item(grad_output), false);
  return gradients;
}

std::tuple<Tensor, Tensors> transformed_l1_value_and_grad_cpu(Tensors tensors, double a) {
  check_list(kOp, tensors);
  Tensors gradients = empty_gradients(tensors);
  const double total = run_cpu(tensors, gradients, a, 1.0, true);
  return {scalar(tensors, total), gradients};
}

#ifdef TSCNC_WITH_CUDA
void run_cuda(const Tensors& tensors, Tensors& gradients, double a, Tensor* value,
              const Tensor* grad_output) {
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::vector<int64_t> numels;
  for (const Tensor& tensor : tensors) {
    inputs.push_back(tensor.const_data_ptr());
    numels.push_back(tensor.numel());
  }
  for (Tensor& gradient : gradients) outputs.push_back(gradient.mutable_data_ptr());
  const auto count = static_cast<int64_t>(tensors.size());
  const auto dtype = static_cast<DType>(tensors[0].scalar_type());
  Tensor workspace;
  if (value != nullptr) {
    const int64_t length = cuda::transformed_l1_workspace_length(numels.data(), count, dtype);
    workspace =
        torch::stable::empty({length}, ScalarType::Double, std::nullopt, tensors[0].device());
  }
  const cudaError_t error = cuda::launch_transformed_l1(
      inputs.data(), outputs.empty() ? nullptr : outputs.data(), numels.data(), count, dtype, a,
      value ? value->mutable_data_ptr() : nullptr,
      value ? static_cast<double*>(workspace.mutable_data_ptr()) : nullptr,
      grad_output ? grad_output->const_data_ptr() : nullptr,
      current_cuda_stream(tensors[0].get_device_index()));
  check_cuda(error, kOp);
}

Tensor empty_scalar(const Tensors& tensors) {
  return torch::stable::empty({}, value_type(tensors[0]), std::nullopt, tensors[0].device());
}

Tensor transformed_l1_cuda(Tensors tensors, double a) {
  check_list(kOp, tensors);
  Tensors no_gradients;
  Tensor value = empty_scalar(tensors);
  run_cuda(tensors, no_gradients, a, &value, nullptr);
  return value;
}

Tensors transformed_l1_backward_cuda(Tensor grad_output, Tensors tensors, double a) {
  check_list(kOp, tensors);
  check_grad_output(grad_output, tensors);
  Tensors gradients = empty_gradients(tensors);
  run_cuda(tensors, gradients, a, nullptr, &grad_output);
  return gradients;
}

std::tuple<Tensor, Tensors> transformed_l1_value_and_grad_cuda(Tensors tensors, double a) {
  check_list(kOp, tensors);
  Tensors gradients = empty_gradients(tensors);
  Tensor value = empty_scalar(tensors);
  run_cuda(tensors, gradients, a, &value, nullptr);
  return {value, gradients};
}
#endif

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("transformed_l1(Tensor[] tensors, float a) -> Tensor");
  m.def("transformed_l1_backward(Tensor grad_output, Tensor[] tensors, float a) -> Tensor[]");
  m.def("transformed_l1_value_and_grad(Tensor[] tensors, float a) -> (Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("transformed_l1", TORCH_BOX(&tscnc::transformed_l1_cpu));
  m.impl("transformed_l1_backward", TORCH_BOX(&tscnc::transformed_l1_backward_cpu));
  m.impl("transformed_l1_value_and_grad", TORCH_BOX(&tscnc::transformed_l1_value_and_grad_cpu));
}

#ifdef TSCNC_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("transformed_l1", TORCH_BOX(&tscnc::transformed_l1_cuda));
  m.impl("transformed_l1_backward", TORCH_BOX(&tscnc::transformed_l1_backward_cuda));
  m.impl("transformed_l1_value_and_grad", TORCH_BOX(&tscnc::transformed_l1_value_and_grad_cuda));
}
#endif
