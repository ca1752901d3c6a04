// 128-bit packs of storage elements, and the type that their arithmetic is done in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../include/dtype.h"

namespace tscnc::cuda {

// Arithmetic is done in float, and in double for double.
template <typename Storage>
using Math = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Elements that one 128-bit load or store moves.
template <typename Storage>
constexpr int kPackSize = 16 / sizeof(Storage);

template <typename Storage>
struct alignas(16) Pack {
  Storage elements[kPackSize<Storage>];
};

__host__ __device__ __forceinline__ bool is_aligned_for_packs(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// One thread's share of a chunk: this many packs, all loaded before the first is used.
constexpr int kPacksPerThread = 4;

// Elements that a block of `kThreads` threads visits with `visit_chunk`.
template <typename Storage, int kThreads>
constexpr int kChunkSize = kThreads * kPacksPerThread * kPackSize<Storage>;

// Calls `visit` with arrays of elements that together are the chunk input[0 .. size), and stores
// what it leaves there into `output` if `kStore`. Aligned chunks move in 128-bit packs, and their
// last elements and unaligned chunks one by one. The order is the same in every run.
template <bool kStore, int kThreads, typename Storage, typename Visit>
__device__ __forceinline__ void visit_chunk(const Storage* input, Storage* output, int size,
                                            Visit visit) {
  const int thread = threadIdx.x;
  int visited = 0;
  if (is_aligned_for_packs(input) && (!kStore || is_aligned_for_packs(output))) {
    const int pack_count = size / kPackSize<Storage>;
    const auto* input_packs = reinterpret_cast<const Pack<Storage>*>(input);
    Pack<Storage> packs[kPacksPerThread];
#pragma unroll
    for (int i = 0; i < kPacksPerThread; ++i) {
      const int index = i * kThreads + thread;
      if (index < pack_count) packs[i] = input_packs[index];
    }
#pragma unroll
    for (int i = 0; i < kPacksPerThread; ++i) {
      const int index = i * kThreads + thread;
      if (index < pack_count) {
        visit(packs[i].elements);
        if constexpr (kStore) reinterpret_cast<Pack<Storage>*>(output)[index] = packs[i];
      }
    }
    visited = pack_count * kPackSize<Storage>;
  }
  for (int index = visited + thread; index < size; index += kThreads) {
    Storage element[1] = {input[index]};
    visit(element);
    if constexpr (kStore) output[index] = element[0];
  }
}

// Calls `function` with a value of the storage type that `dtype` names.
template <typename Function>
cudaError_t dispatch_storage(DType dtype, Function function) {
  switch (dtype) {
    case DType::float16:
      return function(__half());
    case DType::bfloat16:
      return function(__nv_bfloat16());
    case DType::float32:
      return function(float());
    case DType::float64:
      return function(double());
  }
  return cudaErrorInvalidValue;
}

}  // namespace tscnc::cuda
