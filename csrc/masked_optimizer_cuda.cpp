// Optimizer steps on CUDA; Python side and formulas: tscnc_kernels/ops/masked_optimizer.py.
#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "cuda/masked_optimizer.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "masked_optimizer";

void check_lengths(const Tensors& params, const std::vector<const Tensors*>& lists) {
  STD_TORCH_CHECK(!params.empty(), kOp, ": expected at least one parameter");
  for (const Tensors* list : lists) {
    STD_TORCH_CHECK(list->size() == params.size(), kOp, ": expected lists of ", params.size(),
                    " tensors as the parameters, got ", list->size());
  }
}

// The memory of `count` entries of the parameter's dtype.
void* entries(const Tensor& tensor, int64_t count, const Tensor& param, const Tensor& like,
              const char* name) {
  check_on_device(kOp, tensor, like, name);
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count &&
                      tensor.scalar_type() == param.scalar_type(),
                  kOp, ": expected ", name, " to be ", count,
                  " contiguous entries of the parameter's dtype, got ", tensor.numel());
  return const_cast<void*>(tensor.const_data_ptr());
}

// The tensors of one parameter, less its state.
cuda::StepItem step_item(const Tensor& param, const Tensor& grad, const Tensor& row_pointers,
                         const Tensor& columns, const Tensor& like) {
  const int64_t size = param.numel();
  cuda::StepItem item = {{}, 0, size, cuda_dtype(kOp, param)};
  item.tensor.param = entries(param, size, param, like, "a parameter");
  item.tensor.grad = entries(grad, size, param, like, "a gradient");
  if (row_pointers.numel() == 0) return item;
  const cuda::KeptEntries kept =
      kept_on_device(kOp, row_pointers, columns, 0, like, "row_pointers", "columns");
  STD_TORCH_CHECK(size % kept.rows == 0, kOp, ": a pattern of ", kept.rows,
                  " rows does not fit a weight of ", size, " entries");
  item.tensor.width = size / kept.rows;
  item.tensor.pointers = kept.pointers;
  item.tensor.columns = kept.columns;
  item.rows = kept.rows;
  item.count = kept.kept;
  return item;
}

void masked_sgd_step_cuda(Tensors params, Tensors grads, Tensors momentum_buffers,
                          Tensors row_pointers, Tensors columns, double lr, double momentum,
                          double dampening, double weight_decay, bool nesterov, bool maximize,
                          bool first_step) {
  check_lengths(params, {&grads, &row_pointers, &columns});
  const bool buffered = !momentum_buffers.empty();
  if (buffered) check_lengths(params, {&momentum_buffers});
  const Tensor& like = params[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  std::vector<cuda::StepItem> items;
  for (size_t i = 0; i < params.size(); ++i) {
    cuda::StepItem item = step_item(params[i], grads[i], row_pointers[i], columns[i], like);
    if (buffered) {
      item.tensor.first = entries(momentum_buffers[i], item.count, params[i], like, "a state");
    }
    items.push_back(item);
  }
  const SgdOptions options = {lr,       momentum, dampening, weight_decay,
                              nesterov, maximize, first_step};
  check_cuda(cuda::launch_masked_sgd_step(items.data(), static_cast<int64_t>(items.size()), options,
                                          current_cuda_stream(like.get_device_index())),
             kOp);
}

// A counter on the device is counted there; one on the host now.
cuda::StepCount step_count(const Tensor& step, const Tensor& like, double lr, double beta1,
                           double beta2) {
  const bool is_double = step.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(step.numel() == 1 && (is_double || step.scalar_type() == ScalarType::Float), kOp,
                  ": expected steps to be float32 or float64 scalars, got ",
                  torch::headeronly::toString(step.scalar_type()));
  void* data = const_cast<void*>(step.const_data_ptr());
  if (!step.is_cpu()) {
    check_on_device(kOp, step, like, "steps");
    return {data, is_double, 0, 0};
  }
  const double count = is_double ? ++*static_cast<double*>(data) : ++*static_cast<float*>(data);
  return {nullptr, false, lr / (1 - std::pow(beta1, count)),
          1 / std::sqrt(1 - std::pow(beta2, count))};
}

void masked_adamw_step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                            Tensors max_exp_avg_sqs, Tensors steps, Tensors row_pointers,
                            Tensors columns, double lr, double beta1, double beta2, double eps,
                            double weight_decay, bool decoupled_weight_decay, bool maximize) {
  check_lengths(params, {&grads, &exp_avgs, &exp_avg_sqs, &steps, &row_pointers, &columns});
  const bool amsgrad = !max_exp_avg_sqs.empty();
  if (amsgrad) check_lengths(params, {&max_exp_avg_sqs});
  const Tensor& like = params[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  std::vector<cuda::StepItem> items;
  std::vector<cuda::StepCount> counts;
  for (size_t i = 0; i < params.size(); ++i) {
    cuda::StepItem item = step_item(params[i], grads[i], row_pointers[i], columns[i], like);
    const auto state = [&](const Tensor& tensor) {
      return entries(tensor, item.count, params[i], like, "a state");
    };
    item.tensor.first = state(exp_avgs[i]);
    item.tensor.second = state(exp_avg_sqs[i]);
    if (amsgrad) item.tensor.max_second = state(max_exp_avg_sqs[i]);
    items.push_back(item);
  }
  for (const Tensor& step : steps) counts.push_back(step_count(step, like, lr, beta1, beta2));
  const auto count = static_cast<int64_t>(items.size());
  const AdamwOptions options = {beta1,
                                beta2,
                                eps,
                                0,
                                0,
                                decoupled_weight_decay ? 1 - lr * weight_decay : 1,
                                decoupled_weight_decay ? 0 : weight_decay,
                                maximize};
  const Tensor workspace = torch::stable::new_empty(like, {2 * count}, ScalarType::Double);
  check_cuda(cuda::launch_masked_adamw_step(items.data(), counts.data(), count, lr, options,
                                            static_cast<double*>(workspace.mutable_data_ptr()),
                                            current_cuda_stream(like.get_device_index())),
             kOp);
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("masked_sgd_step", TORCH_BOX(&tscnc::masked_sgd_step_cuda));
  m.impl("masked_adamw_step", TORCH_BOX(&tscnc::masked_adamw_step_cuda));
}
#endif
