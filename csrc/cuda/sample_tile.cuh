// Tiles of samples in shared memory, feature by feature, as the sparse products read them.
//
// Every kept entry of a row multiplies one feature of all samples of a tile. So a feature's samples
// lie side by side, in packs of 128 bits, and a team of threads owns one pack each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.cuh"
#include "masked_linear.h"
#include "pack.cuh"

namespace tscnc::cuda {

// A SampleMatrix of one storage type.
template <typename Storage>
struct Samples {
  const Storage* data;
  const Storage* saved;
  int64_t count, width, sample_stride, feature_stride;
  Activation activation;
};

template <typename Storage>
Samples<Storage> samples_of(const SampleMatrix& matrix) {
  return {static_cast<const Storage*>(matrix.data),
          static_cast<const Storage*>(matrix.saved),
          matrix.count,
          matrix.width,
          matrix.sample_stride,
          matrix.feature_stride,
          matrix.activation};
}

template <typename T>
__device__ __forceinline__ T activate(T z, Activation activation) {
  if (activation == Activation::relu) return z < 0 ? T(0) : z;
  return activation == Activation::gelu ? gelu(z) : z;
}

// The entry of one sample and feature; zero beyond the last sample.
template <typename Storage>
__device__ __forceinline__ Storage load_sample(const Samples<Storage>& samples, int64_t sample,
                                               int64_t feature) {
  using T = Math<Storage>;
  if (sample >= samples.count) return Storage(T(0));
  const Storage value =
      samples.data[sample * samples.sample_stride + feature * samples.feature_stride];
  if (samples.saved == nullptr) return value;
  const T saved = static_cast<T>(samples.saved[sample * samples.width + feature]);
  if (samples.activation == Activation::relu) return saved <= 0 ? Storage(T(0)) : value;
  return Storage(static_cast<T>(value) * gelu_gradient(saved));
}

// The same feature of kPackSize consecutive samples.
template <typename Storage>
__device__ __forceinline__ Pack<Storage> load_pack(const Samples<Storage>& samples, int64_t sample,
                                                   int64_t feature) {
  Pack<Storage> pack;
#pragma unroll
  for (int i = 0; i < kPackSize<Storage>; ++i) {
    pack.elements[i] = load_sample(samples, sample + i, feature);
  }
  return pack;
}

// Where a feature's packs are in a tile of `kPacks` packs per feature: pack `member` is at
// tile_place<kPacks>(feature) ^ member. The low bits differ between neighbouring features, so that
// threads which store the same member of consecutive features use different banks.
template <int kPacks>
__device__ __forceinline__ unsigned tile_place(unsigned feature) {
  constexpr unsigned kBankPacks = 8;  // 128 bytes, all banks
  constexpr unsigned kTurn = kPacks < kBankPacks ? kBankPacks / kPacks : 1;
  constexpr unsigned kMask = (kPacks < kBankPacks ? kPacks : kBankPacks) - 1;
  return feature * kPacks | (feature / kTurn & kMask);
}

// Fills the tile with features [first_feature, first_feature + features) of the samples from
// first_sample on. Consecutive threads take consecutive features: a warp reads whole sectors of a
// row-major matrix. The caller synchronises.
template <int kPacks, int kThreads, typename Storage>
__device__ __forceinline__ void stage_tile(Pack<Storage>* tile, const Samples<Storage>& samples,
                                           int64_t first_sample, int64_t first_feature,
                                           int features) {
#pragma unroll 1
  for (int member = 0; member < kPacks; ++member) {
    const int64_t sample = first_sample + member * kPackSize<Storage>;
    for (int feature = threadIdx.x; feature < features; feature += kThreads) {
      tile[tile_place<kPacks>(feature) ^ member] =
          load_pack(samples, sample, first_feature + feature);
    }
  }
}

// What the current device offers to a kernel.
struct DeviceLimits {
  int shared_bytes, processors;
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device);
}

// The bounds of the kept entries of every row within every tile of columns: the entries of row r in
// tile t are bounds[r * tiles + t] up to bounds[r * tiles + t + 1]. With one tile these are the row
// pointers themselves.
inline int64_t tile_bounds_length(const KeptEntries& entries, int64_t tiles) {
  return entries.rows * tiles + 1;
}

constexpr int kBoundsThreads = 256;

// One bound per thread, by bisection among the row's ascending columns.
static __global__ void __launch_bounds__(kBoundsThreads)
    tile_bounds_kernel(const __grid_constant__ KeptEntries entries, int64_t tiles,
                       int64_t tile_width, int32_t* bounds) {
  const int64_t index = int64_t(blockIdx.x) * kBoundsThreads + threadIdx.x;
  if (index > entries.rows * tiles) return;
  const int64_t row = index / tiles;
  int32_t low = entries.pointers[row];
  if (row < entries.rows) {
    const int64_t first_column = (index - row * tiles) * tile_width;
    int32_t high = entries.pointers[row + 1];
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (entries.columns[middle] < first_column) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
  }
  bounds[index] = low;
}

inline cudaError_t launch_tile_bounds(const KeptEntries& entries, int64_t tiles, int64_t tile_width,
                                      int32_t* bounds, cudaStream_t stream) {
  const int64_t length = tile_bounds_length(entries, tiles);
  const int64_t blocks = (length + kBoundsThreads - 1) / kBoundsThreads;
  return launch(tile_bounds_kernel, dim3(unsigned(blocks)), dim3(kBoundsThreads), 0, stream,
                entries, tiles, tile_width, bounds);
}

}  // namespace tscnc::cuda
