#include "transformed_l1.h"

#include <algorithm>

#include "../include/transformed_l1.h"
#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;

template <typename Storage>
constexpr int kChunk = kChunkSize<Storage, kThreads>;

// The tensors of one launch. The table travels as a kernel parameter (at most 4 KiB), so there is
// no copy to wait for, and a CUDA graph keeps it.
constexpr int kMaxTensors = 96;

struct TensorTable {
  const void* inputs[kMaxTensors];
  void* grads[kMaxTensors];
  int64_t numels[kMaxTensors];
  int64_t first_chunks[kMaxTensors + 1];  // tensor i owns chunks first_chunks[i] .. [i + 1]
  int count;
};
static_assert(sizeof(TensorTable) <= 4000, "kernel parameters are limited to 4 KiB");

// The tensor that owns this chunk, by bisection.
__device__ __forceinline__ int find_tensor(const TensorTable& table, int64_t chunk) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunks[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block per chunk. The sum over the chunk goes to chunk_sums[blockIdx.x].
template <typename Storage, bool kValue, bool kGradient>
__global__ void __launch_bounds__(kThreads)
    transformed_l1_kernel(const __grid_constant__ TensorTable table, Math<Storage> a,
                          const Math<Storage>* grad_output, double* chunk_sums) {
  const int64_t chunk = blockIdx.x;
  const int tensor = find_tensor(table, chunk);
  const int64_t begin = (chunk - table.first_chunks[tensor]) * kChunk<Storage>;
  const int64_t rest = table.numels[tensor] - begin;
  const int size = rest < kChunk<Storage> ? int(rest) : kChunk<Storage>;
  const Storage* input = static_cast<const Storage*>(table.inputs[tensor]) + begin;
  Storage* grad = kGradient ? static_cast<Storage*>(table.grads[tensor]) + begin : nullptr;
  const Math<Storage> scale = kGradient && grad_output != nullptr ? *grad_output : Math<Storage>(1);

  double sum = 0;
  visit_chunk<kGradient, kThreads>(input, grad, size, [&](auto& elements) {
    [[maybe_unused]] Math<Storage> pack_sum = 0;
#pragma unroll
    for (Storage& element : elements) {
      const auto t = static_cast<Math<Storage>>(element);
      if constexpr (kValue) pack_sum += transformed_l1_value(t, a);
      if constexpr (kGradient) {
        element = static_cast<Storage>(scale * transformed_l1_gradient(t, a));
      }
    }
    if constexpr (kValue) sum += pack_sum;
  });
  if constexpr (kValue) {
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) chunk_sums[chunk] = sum;
  }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const double* chunk_sums, int64_t chunk_count, Value* value) {
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunk_count; chunk += kThreads) {
    sum += chunk_sums[chunk];
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *value = static_cast<Value>(sum);
}

template <typename Storage>
int64_t chunk_count(int64_t numel) {
  return (numel + kChunk<Storage> - 1) / kChunk<Storage>;
}

// Enqueues the kernel over all tensors, `kMaxTensors` at a time, and counts the chunks.
template <typename Storage, bool kValue, bool kGradient>
cudaError_t launch_tables(const void* const* inputs, void* const* grads, const int64_t* numels,
                          int64_t count, double a, double* workspace, const void* grad_output,
                          cudaStream_t stream, int64_t* chunks) {
  int64_t tensor = 0;
  while (tensor < count) {
    TensorTable table = {};
    for (; tensor < count && table.count < kMaxTensors; ++tensor) {
      if (numels[tensor] == 0) continue;
      const int row = table.count++;
      table.inputs[row] = inputs[tensor];
      table.grads[row] = kGradient ? grads[tensor] : nullptr;
      table.numels[row] = numels[tensor];
      table.first_chunks[row + 1] = table.first_chunks[row] + chunk_count<Storage>(numels[tensor]);
    }
    const int64_t table_chunks = table.first_chunks[table.count];
    if (table_chunks == 0) continue;
    double* chunk_sums = kValue ? workspace + *chunks : nullptr;
    const cudaError_t error =
        launch(transformed_l1_kernel<Storage, kValue, kGradient>, dim3(unsigned(table_chunks)),
               dim3(kThreads), 0, stream, table, Math<Storage>(a),
               static_cast<const Math<Storage>*>(grad_output), chunk_sums);
    if (error != cudaSuccess) return error;
    *chunks += table_chunks;
  }
  return cudaSuccess;
}

}  // namespace

int64_t transformed_l1_workspace_length(const int64_t* numels, int64_t count, DType dtype) {
  int64_t length = 0;
  dispatch_storage(dtype, [&](auto storage) {
    for (int64_t i = 0; i < count; ++i) length += chunk_count<decltype(storage)>(numels[i]);
    return cudaSuccess;
  });
  return length;
}

cudaError_t launch_transformed_l1(const void* const* inputs, void* const* grads,
                                  const int64_t* numels, int64_t count, DType dtype, double a,
                                  void* value, double* workspace, const void* grad_output,
                                  cudaStream_t stream) {
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const bool with_gradient = grads != nullptr;
    if (value == nullptr && !with_gradient) return cudaSuccess;
    const auto launch_all = value == nullptr ? launch_tables<Storage, false, true>
                            : !with_gradient ? launch_tables<Storage, true, false>
                                             : launch_tables<Storage, true, true>;
    int64_t chunks = 0;
    const cudaError_t error =
        launch_all(inputs, grads, numels, count, a, workspace, grad_output, stream, &chunks);
    if (error != cudaSuccess || value == nullptr) return error;
    return launch(sum_chunks_kernel<Math<Storage>>, dim3(1), dim3(kThreads), 0, stream,
                  static_cast<const double*>(workspace), chunks,
                  static_cast<Math<Storage>*>(value));
  });
}

}  // namespace tscnc::cuda
