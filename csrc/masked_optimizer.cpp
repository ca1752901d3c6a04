// Optimizer steps over lists of tensors; Python side and formulas:
// tscnc_kernels/ops/masked_optimizer.py.
#include "cpu/masked_optimizer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dtype_dispatch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "masked_optimizer";
// Entries per unit of parallel work, and those below which a second thread costs more than it
// saves.
constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kParallelEntries = 1 << 15;

// Entries [begin, end) of a tensor, or rows.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

void check_lengths(const Tensors& params, const std::vector<const Tensors*>& lists) {
  for (const Tensors* list : lists) {
    STD_TORCH_CHECK(list->size() == params.size(), kOp, ": expected lists of ", params.size(),
                    " tensors as the parameters, got ", list->size());
  }
}

void check_entries(const Tensor& tensor, int64_t count, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == count &&
                      tensor.scalar_type() == dtype,
                  kOp, ": expected ", name, " to be ", count,
                  " contiguous entries on the CPU of the parameter's dtype, got ", tensor.numel());
}

// The tensors of one parameter, less its state, and the number of entries that are stepped.
StepTensor step_tensor(const Tensor& param, const Tensor& grad, const Tensor& row_pointers,
                       const Tensor& columns, int64_t* count) {
  const int64_t size = param.numel();
  check_entries(param, size, param.scalar_type(), "a parameter");
  check_entries(grad, size, param.scalar_type(), "a gradient");
  StepTensor tensor = {};
  tensor.param = const_cast<void*>(param.const_data_ptr());
  tensor.grad = grad.const_data_ptr();
  *count = size;
  if (row_pointers.numel() == 0) return tensor;
  const int64_t rows = row_pointers.numel() - 1;
  STD_TORCH_CHECK(rows > 0 && size % rows == 0, kOp, ": a pattern of ", rows,
                  " rows does not fit a weight of ", size, " entries");
  *count = columns.numel();
  tensor.width = size / rows;
  tensor.pointers = pointer_data(kOp, row_pointers, *count, "row_pointers");
  tensor.columns = bounded_index(kOp, columns, *count, tensor.width, "columns");
  return tensor;
}

void* state_data(const Tensor& state, int64_t count, const Tensor& param) {
  check_entries(state, count, param.scalar_type(), "a state");
  return const_cast<void*>(state.const_data_ptr());
}

// Pieces of about kChunk entries; the rows of a pattern stay whole.
void add_chunks(std::vector<Chunk>& chunks, size_t index, const StepTensor& tensor, int64_t size,
                int64_t rows) {
  if (tensor.pointers == nullptr) {
    for (int64_t begin = 0; begin < size; begin += kChunk) {
      chunks.push_back({index, begin, std::min(begin + kChunk, size)});
    }
    return;
  }
  for (int64_t begin = 0; begin < rows;) {
    const int32_t* first = tensor.pointers + begin + 1;
    const int32_t* last = tensor.pointers + rows + 1;
    const int64_t limit = tensor.pointers[begin] + kChunk;
    const int64_t end =
        std::max<int64_t>(begin + 1, std::upper_bound(first, last, limit) - tensor.pointers - 1);
    chunks.push_back({index, begin, end});
    begin = end;
  }
}

template <class Options>
struct Steps {
  using Kernel = void (*)(const StepTensor&, const Options&, int64_t, int64_t);
  std::vector<StepTensor> tensors;
  std::vector<Options> options;
  std::vector<Kernel> kernels;
  std::vector<Chunk> chunks;
  int64_t entries = 0;

  void add(const StepTensor& tensor, const Options& how, Kernel kernel, const Tensor& row_pointers,
           int64_t count) {
    add_chunks(chunks, tensors.size(), tensor, count, row_pointers.numel() - 1);
    tensors.push_back(tensor);
    options.push_back(how);
    kernels.push_back(kernel);
    entries += count;
  }

  void run() const {
    const auto count = static_cast<int64_t>(chunks.size());
    const int64_t grain = entries < kParallelEntries ? std::max<int64_t>(1, count) : 1;
    torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Chunk& chunk = chunks[i];
        kernels[chunk.tensor](tensors[chunk.tensor], options[chunk.tensor], chunk.begin, chunk.end);
      }
    });
  }
};

void masked_sgd_step_cpu(Tensors params, Tensors grads, Tensors momentum_buffers,
                         Tensors row_pointers, Tensors columns, double lr, double momentum,
                         double dampening, double weight_decay, bool nesterov, bool maximize,
                         bool first_step) {
  check_lengths(params, {&grads, &row_pointers, &columns});
  const bool buffered = !momentum_buffers.empty();
  if (buffered) check_lengths(params, {&momentum_buffers});
  Steps<SgdOptions> steps;
  for (size_t i = 0; i < params.size(); ++i) {
    int64_t count = 0;
    StepTensor tensor = step_tensor(params[i], grads[i], row_pointers[i], columns[i], &count);
    if (buffered) tensor.first = state_data(momentum_buffers[i], count, params[i]);
    dispatch_floating(kOp, params[i].scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      steps.add(tensor, {lr, momentum, dampening, weight_decay, nesterov, maximize, first_step},
                TSCNC_SELECT(masked_sgd_step<T>), row_pointers[i], count);
    });
  }
  steps.run();
}

// Adds one to a counter of steps and returns it.
double next_step(const Tensor& step) {
  STD_TORCH_CHECK(step.is_cpu() && step.numel() == 1, kOp,
                  ": expected steps to be scalars on the CPU");
  void* data = const_cast<void*>(step.const_data_ptr());
  if (step.scalar_type() == ScalarType::Double) return ++*static_cast<double*>(data);
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float, kOp,
                  ": expected steps of dtype float32 or float64, got ",
                  torch::headeronly::toString(step.scalar_type()));
  return ++*static_cast<float*>(data);
}

void masked_adamw_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                           Tensors max_exp_avg_sqs, Tensors steps, Tensors row_pointers,
                           Tensors columns, double lr, double beta1, double beta2, double eps,
                           double weight_decay, bool decoupled_weight_decay, bool maximize) {
  check_lengths(params, {&grads, &exp_avgs, &exp_avg_sqs, &steps, &row_pointers, &columns});
  const bool amsgrad = !max_exp_avg_sqs.empty();
  if (amsgrad) check_lengths(params, {&max_exp_avg_sqs});
  Steps<AdamwOptions> work;
  for (size_t i = 0; i < params.size(); ++i) {
    int64_t count = 0;
    StepTensor tensor = step_tensor(params[i], grads[i], row_pointers[i], columns[i], &count);
    tensor.first = state_data(exp_avgs[i], count, params[i]);
    tensor.second = state_data(exp_avg_sqs[i], count, params[i]);
    if (amsgrad) tensor.max_second = state_data(max_exp_avg_sqs[i], count, params[i]);
    const double step = next_step(steps[i]);
    const AdamwOptions options = {beta1,
                                  beta2,
                                  eps,
                                  lr / (1 - std::pow(beta1, step)),
                                  1 / std::sqrt(1 - std::pow(beta2, step)),
                                  decoupled_weight_decay ? 1 - lr * weight_decay : 1,
                                  decoupled_weight_decay ? 0 : weight_decay,
                                  maximize};
    dispatch_floating(kOp, params[i].scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      work.add(tensor, options, TSCNC_SELECT(masked_adamw_step<T>), row_pointers[i], count);
    });
  }
  work.run();
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor[] row_pointers, Tensor[] columns, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first_step) -> ()");
  m.def(
      "masked_adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, "
      "Tensor[] row_pointers, Tensor[] columns, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled_weight_decay, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("masked_sgd_step", TORCH_BOX(&tscnc::masked_sgd_step_cpu));
  m.impl("masked_adamw_step", TORCH_BOX(&tscnc::masked_adamw_step_cpu));
}
