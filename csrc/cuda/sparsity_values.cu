// Between a matrix and its kept entries.
//
// Bound: device memory. `mask_kernel` moves 128-bit packs; the others read or write one sector per
// kept entry of the matrix, and the values in order.
#include "sparsity_values.h"

#include "launch.cuh"
#include "pack.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;
// Threads per row.
constexpr int kTeam = 8;

// Calls function(row, entry, column) for the kept entries, a team per row.
template <typename Function>
__device__ __forceinline__ void for_entries(const KeptEntries& entries, const Function& function) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  if (row >= entries.rows) return;
  const int32_t end = entries.pointers[row + 1];
#pragma unroll 4
  for (int32_t entry = entries.pointers[row] + int32_t(threadIdx.x % kTeam); entry < end;
       entry += kTeam) {
    function(row, entry, entries.columns[entry]);
  }
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ KeptEntries entries, const Storage* matrix,
                  int64_t row_stride, int64_t column_stride, Storage* values) {
  for_entries(entries, [&](int64_t row, int32_t entry, int64_t column) {
    values[entry] = matrix[row * row_stride + column * column_stride];
  });
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ KeptEntries entries, const Storage* values,
                   Storage* matrix) {
  for_entries(entries, [&](int64_t row, int32_t entry, int64_t column) {
    matrix[row * entries.width + column] = values[entry];
  });
}

// A thread's packs are the grid's threads apart, so that a warp moves whole lines.
constexpr int kPacks = 4;

template <typename Storage>
__global__ void __launch_bounds__(kThreads, 4)
    mask_kernel(const Storage* input, const uint8_t* bits, int64_t count, Storage* output) {
  constexpr int kSize = kPackSize<Storage>;
  const Storage zero = Storage(Math<Storage>(0));
  const bool is_aligned = is_aligned_for_packs(input) && is_aligned_for_packs(output);
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPacks + threadIdx.x;
  Pack<Storage> packs[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t begin = (first + i * kThreads) * kSize;
    if (is_aligned && begin + kSize <= count) {
      packs[i] = *reinterpret_cast<const Pack<Storage>*>(input + begin);
    }
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t begin = (first + i * kThreads) * kSize;
    if (begin >= count) return;
    const unsigned kept = bits[begin / 8] >> (begin % 8);
    if (is_aligned && begin + kSize <= count) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        packs[i].elements[j] = kept >> j & 1 ? packs[i].elements[j] : zero;
      }
      *reinterpret_cast<Pack<Storage>*>(output + begin) = packs[i];
      continue;
    }
    for (int j = 0; j < kSize && begin + j < count; ++j) {
      output[begin + j] = kept >> j & 1 ? input[begin + j] : zero;
    }
  }
}

dim3 blocks_of(int64_t threads) { return dim3(unsigned((threads + kThreads - 1) / kThreads)); }

}  // namespace

cudaError_t launch_gather(const KeptEntries& entries, const void* matrix, int64_t row_stride,
                          int64_t column_stride, void* values, DType dtype, cudaStream_t stream) {
  if (entries.kept == 0) return cudaSuccess;
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    return launch(gather_kernel<Storage>, blocks_of(entries.rows * kTeam), dim3(kThreads), 0,
                  stream, entries, static_cast<const Storage*>(matrix), row_stride, column_stride,
                  static_cast<Storage*>(values));
  });
}

cudaError_t launch_scatter(const KeptEntries& entries, const void* values, void* matrix,
                           DType dtype, cudaStream_t stream) {
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto bytes = size_t(entries.rows * entries.width) * sizeof(Storage);
    const cudaError_t error = cudaMemsetAsync(matrix, 0, bytes, stream);
    if (error != cudaSuccess || entries.kept == 0) return error;
    return launch(scatter_kernel<Storage>, blocks_of(entries.rows * kTeam), dim3(kThreads), 0,
                  stream, entries, static_cast<const Storage*>(values),
                  static_cast<Storage*>(matrix));
  });
}

cudaError_t launch_mask(const void* input, const uint8_t* bits, int64_t count, void* output,
                        DType dtype, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t packs = (count + kPackSize<Storage> - 1) / kPackSize<Storage>;
    return launch(mask_kernel<Storage>, blocks_of((packs + kPacks - 1) / kPacks), dim3(kThreads), 0,
                  stream, static_cast<const Storage*>(input), bits, count,
                  static_cast<Storage*>(output));
  });
}

}  // namespace tscnc::cuda
