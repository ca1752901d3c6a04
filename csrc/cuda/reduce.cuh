// Sums over a warp and over a block, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace tscnc::cuda {

constexpr int kWarpSize = 32;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over a one-dimensional block of `kThreads` threads, valid in thread 0. Every thread of
// the block must call it; a second call needs a __syncthreads() in between.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= kWarpSize * kWarpSize,
                "a block is a whole number of warps, at most 32");
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ T warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kWarps ? warp_sums[lane] : T(0));
  return value;
}

}  // namespace tscnc::cuda
