// Kernels, right and wrong on purpose, that prove what the emulation does and what it catches.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace {

using tscnc::cuda::launch;

__global__ void block_sum_kernel(const double* input, double* sums) {
  const double sum = tscnc::cuda::block_sum<128>(input[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Every thread takes its neighbour's element from shared memory, with or without the barrier.
template <bool kWithBarrier>
__global__ void rotate_kernel(const float* input, float* output) {
  __shared__ float elements[64];
  elements[threadIdx.x] = input[threadIdx.x];
  if constexpr (kWithBarrier) __syncthreads();
  output[threadIdx.x] = elements[(threadIdx.x + 1) % 64];
}

// Copies a thread's element while it does nothing, in two groups of which it waits for the first.
template <bool kWaitsForAll>
__global__ void copy_kernel(const float* input, float* output) {
  __shared__ float elements[2][32];
  for (int group = 0; group < 2; ++group) {
    __pipeline_memcpy_async(&elements[group][threadIdx.x], input + 32 * group + threadIdx.x,
                            sizeof(float));
    __pipeline_commit();
  }
  __pipeline_wait_prior(kWaitsForAll ? 0 : 1);
  output[threadIdx.x] = elements[0][threadIdx.x];
  output[32 + threadIdx.x] = elements[1][threadIdx.x];
  __pipeline_wait_prior(0);
}

__global__ void misaligned_copy_kernel(const float* input) {
  __shared__ float elements[8];
  __pipeline_memcpy_async(elements, input + 1, 16);
}

// Uses the array again without waiting for the readers of its first content.
__global__ void reuse_kernel(const float* input, float* output) {
  __shared__ float elements[64];
  elements[threadIdx.x] = input[threadIdx.x];
  __syncthreads();
  const float neighbour = elements[(threadIdx.x + 1) % 64];
  elements[threadIdx.x] = 2 * input[threadIdx.x];
  __syncthreads();
  output[threadIdx.x] = neighbour + elements[(threadIdx.x + 1) % 64];
}

// Reads 63 elements that no thread wrote in this block; the first block wrote all.
__global__ void unset_shared_kernel(float* output) {
  __shared__ float elements[64];
  if (blockIdx.x == 0 || threadIdx.x == 0) elements[threadIdx.x] = 1;
  __syncthreads();
  output[blockIdx.x * 64 + threadIdx.x] = elements[threadIdx.x];
}

__global__ void misaligned_load_kernel(const float* input, float4* output) {
  output[threadIdx.x] = reinterpret_cast<const float4*>(input + 1)[threadIdx.x];
}

__global__ void out_of_bounds_kernel(float* output, int index) {
  __shared__ float elements[64];
  elements[threadIdx.x] = 0;
  output[threadIdx.x] = elements[index];
}

__global__ void early_exit_kernel() {
  if (threadIdx.x < 3) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle_kernel(int* output) {
  if (threadIdx.x < 16) output[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
  __syncthreads();
}

// A warp operation of the lower half, then one of all lanes.
__global__ void warp_operations_kernel(int* output) {
  const int lane = threadIdx.x;
  int* mine = output + 6 * lane;
  mine[0] = lane < 16 ? __shfl_down_sync(0x0000ffffu, lane, 3, 16) : -1;
  mine[1] = __shfl_up_sync(0xffffffffu, lane, 2);
  mine[2] = __shfl_sync(0xffffffffu, lane, 5, 8);
  mine[3] = int(__ballot_sync(0xffffffffu, lane % 3 == 0));
  mine[4] = __syncthreads_count(lane % 2);
  mine[5] = __all_sync(0xffffffffu, lane < 32) + 2 * __any_sync(0xffffffffu, lane > 32);
}

__global__ void count_kernel(int* count, dim3 expected_grid) {
  if (gridDim.x == expected_grid.x && gridDim.y == expected_grid.y) atomicAdd(count, 1);
}

// Reverses a block through `shared_floats` elements of dynamic shared memory.
__global__ void reverse_kernel(float* elements) {
  float* shared = tscnc::cuda::dynamic_shared<float>();
  shared[threadIdx.x] = elements[threadIdx.x];
  __syncthreads();
  elements[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

}  // namespace

extern "C" int block_sums(const double* input, double* sums, int blocks) {
  return launch(block_sum_kernel, dim3(blocks), dim3(128), 0, nullptr, input, sums);
}
extern "C" int rotate(const float* input, float* output, int with_barrier) {
  return launch(with_barrier ? rotate_kernel<true> : rotate_kernel<false>, dim3(1), dim3(64), 0,
                nullptr, input, output);
}
extern "C" int copy(const float* input, float* output, int waits_for_all) {
  return launch(waits_for_all ? copy_kernel<true> : copy_kernel<false>, dim3(1), dim3(32), 0,
                nullptr, input, output);
}
extern "C" int misaligned_copy(const float* input) {
  return launch(misaligned_copy_kernel, dim3(1), dim3(1), 0, nullptr, input);
}
extern "C" int reuse(const float* input, float* output) {
  return launch(reuse_kernel, dim3(1), dim3(64), 0, nullptr, input, output);
}
extern "C" int unset_shared(float* output) {
  return launch(unset_shared_kernel, dim3(2), dim3(64), 0, nullptr, output);
}
extern "C" int misaligned_load(const float* input, float4* output) {
  return launch(misaligned_load_kernel, dim3(1), dim3(2), 0, nullptr, input, output);
}
extern "C" int out_of_bounds(float* output) {
  return launch(out_of_bounds_kernel, dim3(1), dim3(64), 0, nullptr, output, 64);
}
extern "C" int early_exit() { return launch(early_exit_kernel, dim3(2), dim3(64), 0, nullptr); }
extern "C" int two_barriers() { return launch(two_barriers_kernel, dim3(1), dim3(64), 0, nullptr); }
extern "C" int divergent_shuffle(int* output) {
  return launch(divergent_shuffle_kernel, dim3(1), dim3(32), 0, nullptr, output);
}
extern "C" int warp_operations(int* output) {
  return launch(warp_operations_kernel, dim3(1), dim3(32), 0, nullptr, output);
}
extern "C" int count_threads(int* count, int x, int y) {
  return launch(count_kernel, dim3(x, y), dim3(8, 4, 2), 0, nullptr, count, dim3(x, y));
}
extern "C" int reverse(float* elements, int threads, int shared_bytes) {
  return launch(reverse_kernel, dim3(1), dim3(threads), shared_bytes, nullptr, elements);
}
