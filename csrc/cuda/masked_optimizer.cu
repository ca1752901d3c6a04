// Steps of many tensors in one launch.
//
// Bound: device memory; at high sparsity one sector of the parameter and one of the gradient per
// kept entry. A thread has several entries, all loaded before the first is stored.
#include "masked_optimizer.h"

#include <cmath>

#include "launch.cuh"
#include "pack.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kChunk = kThreads * kPerThread;
// The tables travel as kernel parameters, at most 4 KiB.
constexpr int kMaxTensors = 35;
constexpr int kStates = 3;

struct TableRow {
  StepTensor tensor;
  int64_t rows, count;
  double step_size, inverse_root;
  const double* corrections;  // these two in device memory, or null
};

struct StepTable {
  TableRow rows[kMaxTensors];
  int64_t first_chunks[kMaxTensors + 1];
  int count;
};
static_assert(sizeof(StepTable) <= 4000, "kernel parameters are limited to 4 KiB");

// The last place in [low, high) whose start is not above `index`; starts[low] is not.
template <typename Start>
__device__ __forceinline__ int64_t find_part(const Start* starts, int64_t low, int64_t high,
                                             int64_t index) {
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename S>
struct SgdStep {
  SgdFormula<S> formula;

  __device__ __forceinline__ void start(const TableRow&) {}

  __device__ __forceinline__ void operator()(S& param, S grad, S (&state)[kStates],
                                             const StepTensor& tensor) const {
    S g = formula.gradient(param, grad);
    if (tensor.first != nullptr) {
      state[0] = formula.first_step ? g : formula.buffer(g, state[0]);
      g = formula.direction(g, state[0]);
    }
    param = param - formula.lr * g;
  }
};

template <typename S>
struct AdamwStep {
  AdamwFormula<S> formula;

  __device__ __forceinline__ void start(const TableRow& row) {
    const bool is_host = row.corrections == nullptr;
    formula.step_size = S(is_host ? row.step_size : row.corrections[0]);
    formula.inverse_root = S(is_host ? row.inverse_root : row.corrections[1]);
  }

  __device__ __forceinline__ void operator()(S& param, S grad, S (&state)[kStates],
                                             const StepTensor& tensor) const {
    using std::sqrt;
    const S g = formula.gradient(param, grad);
    state[0] = formula.first_moment(g, state[0]);
    state[1] = formula.second_moment(g, state[1]);
    if (tensor.max_second != nullptr) state[2] = formula.larger(state[1], state[2]);
    const S moment = tensor.max_second != nullptr ? state[2] : state[1];
    param = formula.stepped(param, state[0], sqrt(moment));
  }
};

// One block per chunk of entries.
template <typename Storage, typename Step>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ StepTable table, Step step) {
  using S = Math<Storage>;
  const int64_t index = find_part(table.first_chunks, 0, table.count, blockIdx.x);
  const TableRow& row = table.rows[index];
  const StepTensor& tensor = row.tensor;
  const int64_t begin = (blockIdx.x - table.first_chunks[index]) * kChunk;
  const int64_t end = begin + kChunk < row.count ? begin + kChunk : row.count;
  // The rows of the chunk's first and last entry: between them every thread looks for its own.
  __shared__ int64_t ends[2];
  if (tensor.pointers != nullptr) {
    if (threadIdx.x < 2) {
      ends[threadIdx.x] =
          find_part(tensor.pointers, 0, row.rows, threadIdx.x == 0 ? begin : end - 1);
    }
    __syncthreads();
  }
  step.start(row);
  Storage* params = static_cast<Storage*>(tensor.param);
  const Storage* grads = static_cast<const Storage*>(tensor.grad);
  Storage* const states[kStates] = {static_cast<Storage*>(tensor.first),
                                    static_cast<Storage*>(tensor.second),
                                    static_cast<Storage*>(tensor.max_second)};
  int64_t places[kPerThread];
  S param[kPerThread], grad[kPerThread], state[kPerThread][kStates];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t entry = begin + i * kThreads + threadIdx.x;
    if (entry >= end) continue;
    places[i] = entry;
    if (tensor.pointers != nullptr) {
      const int64_t matrix_row = find_part(tensor.pointers, ends[0], ends[1] + 1, entry);
      places[i] = matrix_row * tensor.width + tensor.columns[entry];
    }
    param[i] = static_cast<S>(params[places[i]]);
    grad[i] = static_cast<S>(grads[places[i]]);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      state[i][s] = states[s] != nullptr ? static_cast<S>(states[s][entry]) : S(0);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t entry = begin + i * kThreads + threadIdx.x;
    if (entry >= end) return;
    step(param[i], grad[i], state[i], tensor);
    params[places[i]] = static_cast<Storage>(param[i]);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (states[s] != nullptr) states[s][entry] = static_cast<Storage>(state[i][s]);
    }
  }
}

constexpr int kMaxCounters = 128;

struct CounterTable {
  void* counters[kMaxCounters];
  bool is_double[kMaxCounters];
  int count;
};

// Adds one to every counter, and writes what AdamW's step needs of it.
__global__ void count_kernel(const __grid_constant__ CounterTable table, double lr, double beta1,
                             double beta2, double* corrections) {
  const int index = int(threadIdx.x);
  if (index >= table.count || table.counters[index] == nullptr) return;
  double step;
  if (table.is_double[index]) {
    step = ++*static_cast<double*>(table.counters[index]);
  } else {
    step = ++*static_cast<float*>(table.counters[index]);
  }
  corrections[2 * index] = lr / (1 - pow(beta1, step));
  corrections[2 * index + 1] = 1 / sqrt(1 - pow(beta2, step));
}

// Launches the step of all items of a storage type, `kMaxTensors` at a time.
template <typename Storage, typename Step>
cudaError_t launch_steps(const StepItem* items, const StepCount* counts, int64_t count, DType dtype,
                         const double* workspace, const Step& step, cudaStream_t stream) {
  for (int64_t item = 0; item < count;) {
    StepTable table = {};
    for (; item < count && table.count < kMaxTensors; ++item) {
      if (items[item].dtype != dtype || items[item].count == 0) continue;
      const int place = table.count++;
      TableRow& row = table.rows[place];
      row = {items[item].tensor, items[item].rows, items[item].count, 0, 0, nullptr};
      if (counts != nullptr) {
        row.step_size = counts[item].step_size;
        row.inverse_root = counts[item].inverse_root;
        if (counts[item].counter != nullptr) row.corrections = workspace + 2 * item;
      }
      table.first_chunks[place + 1] =
          table.first_chunks[place] + (items[item].count + kChunk - 1) / kChunk;
    }
    const int64_t chunks = table.first_chunks[table.count];
    if (chunks == 0) continue;
    const cudaError_t error = launch(step_kernel<Storage, Step>, dim3(unsigned(chunks)),
                                     dim3(kThreads), 0, stream, table, step);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Calls function(storage, dtype) for the storage types that the items have.
template <typename Function>
cudaError_t for_dtypes(const StepItem* items, int64_t count, const Function& function) {
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
    bool is_there = false;
    for (int64_t i = 0; i < count; ++i) is_there = is_there || items[i].dtype == dtype;
    if (!is_there) continue;
    const cudaError_t error =
        dispatch_storage(dtype, [&](auto storage) { return function(storage, dtype); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_masked_sgd_step(const StepItem* items, int64_t count, const SgdOptions& options,
                                   cudaStream_t stream) {
  return for_dtypes(items, count, [&](auto storage, DType dtype) {
    using Storage = decltype(storage);
    const SgdStep<Math<Storage>> step = {SgdFormula<Math<Storage>>(options)};
    return launch_steps<Storage>(items, nullptr, count, dtype, nullptr, step, stream);
  });
}

cudaError_t launch_masked_adamw_step(const StepItem* items, const StepCount* counts, int64_t count,
                                     double lr, const AdamwOptions& options, double* workspace,
                                     cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kMaxCounters) {
    CounterTable table = {};
    bool any = false;
    for (int64_t i = first; i < count && table.count < kMaxCounters; ++i) {
      table.counters[table.count] = counts[i].counter;
      table.is_double[table.count++] = counts[i].is_double;
      any = any || counts[i].counter != nullptr;
    }
    if (!any) continue;
    const cudaError_t error = launch(count_kernel, dim3(1), dim3(kMaxCounters), 0, stream, table,
                                     lr, options.beta1, options.beta2, workspace + 2 * first);
    if (error != cudaSuccess) return error;
  }
  return for_dtypes(items, count, [&](auto storage, DType dtype) {
    using Storage = decltype(storage);
    const AdamwStep<Math<Storage>> step = {AdamwFormula<Math<Storage>>(options)};
    return launch_steps<Storage>(items, counts, count, dtype, workspace, step, stream);
  });
}

}  // namespace tscnc::cuda
