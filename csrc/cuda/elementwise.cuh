// One result for every element of some arrays of equal length.
//
// Bound: device memory. Aligned arrays move in 128-bit packs.
#pragma once

#include "launch.cuh"
#include "pack.cuh"

namespace tscnc::cuda {

constexpr int kMapThreads = 256;
// Packs that a thread loads of every array before it uses the first.
constexpr int kMapPacks = 2;

// The arrays of one launch: `inputs` are read and `output` is written.
template <typename Storage, int kInputs>
struct MapArrays {
  const Storage* inputs[kInputs];
  Storage* output;
  int64_t count;
};

// output[i] = function(inputs[0][i], inputs[1][i], ...), computed in Math<Storage>.
template <typename Storage, int kInputs, typename Function>
__global__ void __launch_bounds__(kMapThreads, 4)
    map_kernel(const __grid_constant__ MapArrays<Storage, kInputs> arrays,
               const __grid_constant__ Function function) {
  constexpr int kSize = kPackSize<Storage>;
  const auto apply = [&](const Storage(&elements)[kInputs]) {
    Math<Storage> values[kInputs];
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      values[input] = static_cast<Math<Storage>>(elements[input]);
    }
    return static_cast<Storage>(function(values));
  };
  bool is_aligned = is_aligned_for_packs(arrays.output);
#pragma unroll
  for (int input = 0; input < kInputs; ++input) {
    is_aligned = is_aligned && is_aligned_for_packs(arrays.inputs[input]);
  }
  const int64_t first = int64_t(blockIdx.x) * kMapThreads * kMapPacks + threadIdx.x;
  Pack<Storage> packs[kMapPacks][kInputs];
#pragma unroll
  for (int i = 0; i < kMapPacks; ++i) {
    const int64_t begin = (first + i * kMapThreads) * kSize;
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      if (is_aligned && begin + kSize <= arrays.count) {
        packs[i][input] = *reinterpret_cast<const Pack<Storage>*>(arrays.inputs[input] + begin);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMapPacks; ++i) {
    const int64_t begin = (first + i * kMapThreads) * kSize;
    if (begin >= arrays.count) return;
    Storage elements[kInputs];
    if (is_aligned && begin + kSize <= arrays.count) {
      Pack<Storage> results;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
#pragma unroll
        for (int input = 0; input < kInputs; ++input) elements[input] = packs[i][input].elements[j];
        results.elements[j] = apply(elements);
      }
      *reinterpret_cast<Pack<Storage>*>(arrays.output + begin) = results;
      continue;
    }
    for (int64_t j = begin; j < begin + kSize && j < arrays.count; ++j) {
#pragma unroll
      for (int input = 0; input < kInputs; ++input) elements[input] = arrays.inputs[input][j];
      arrays.output[j] = apply(elements);
    }
  }
}

template <typename Storage, int kInputs, typename Function>
cudaError_t launch_map(const MapArrays<Storage, kInputs>& arrays, const Function& function,
                       cudaStream_t stream) {
  if (arrays.count == 0) return cudaSuccess;
  const int64_t share = int64_t(kMapThreads) * kMapPacks * kPackSize<Storage>;
  const auto blocks = unsigned((arrays.count + share - 1) / share);
  return launch(map_kernel<Storage, kInputs, Function>, dim3(blocks), dim3(kMapThreads), 0, stream,
                arrays, function);
}

}  // namespace tscnc::cuda
