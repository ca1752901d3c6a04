// Kept entries in two orders, from the bits of a mask.
//
// Popcounts, prefix sums, and two scatters. A thread of the second order has one column in a range
// of rows, so that entries come out sorted without atomics; it finds an entry's place in the first
// order from the number of kept entries in front of its group of 32 columns. Bound: device memory.
#include "sparsity.h"

#include <algorithm>

#include "launch.cuh"
#include "reduce.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Columns whose bits one load fetches.
constexpr int kGroup = 32;
// Rows of one thread of the column order, at least.
constexpr int64_t kChunkRows = 64;
// Places that a thread of the prefix sums adds up by itself.
constexpr int kScanned = 8;

__host__ __device__ __forceinline__ int64_t groups_of(int64_t width) {
  return (width + kGroup - 1) / kGroup;
}

// Ranges of rows: short ones for parallel work, but no more than keep the prefix sums cheap.
struct Chunks {
  int64_t count, rows;
};

Chunks chunks_of(int64_t rows) {
  const int64_t each = std::max(kChunkRows, (rows + 63) / 64);
  return {(rows + each - 1) / each, each};
}

// Bits of the columns [group * kGroup, ...) of a row, zeros beyond the width.
__device__ __forceinline__ unsigned group_bits(const PatternIndex& index, int64_t row,
                                               int64_t group) {
  const int64_t first = row * index.width + group * kGroup;
  const int64_t rest = index.width - group * kGroup;
  const int count = rest < kGroup ? int(rest) : kGroup;
  const int shift = int(first % 8);
  const uint8_t* bytes = index.bits + first / 8;
  uint64_t found = 0;
#pragma unroll
  for (int i = 0; i < kGroup / 8 + 1; ++i) {
    if (8 * i < shift + count) found |= uint64_t(bytes[i]) << (8 * i);
  }
  return unsigned((found >> shift) & ((uint64_t(1) << count) - 1));
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const bool* mask, int64_t count, uint8_t* bits) {
  const int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * byte >= count) return;
  const bool* entries = mask + 8 * byte;
  if (reinterpret_cast<uintptr_t>(mask) % 8 == 0 && 8 * byte + 8 <= count) {
    // Every byte is 0 or 1; the product brings byte i to bit 56 + i.
    const uint64_t flags = *reinterpret_cast<const uint64_t*>(entries);
    bits[byte] = uint8_t(flags * 0x0102040810204080u >> 56);
    return;
  }
  unsigned packed = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (8 * byte + i < count) packed |= unsigned(entries[i]) << i;
  }
  bits[byte] = uint8_t(packed);
}

// The sum over the lanes up to this one.
template <typename T>
__device__ __forceinline__ T sum_so_far(T value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// A warp per row: how many entries it keeps, and how many in front of each group.
__global__ void __launch_bounds__(kThreads)
    count_rows_kernel(const __grid_constant__ PatternIndex index, int32_t* ranks) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= index.rows) return;
  const int64_t groups = groups_of(index.width);
  int32_t before = 0;
  for (int64_t first = 0; first < groups; first += kWarpSize) {
    const int64_t group = first + lane;
    const int32_t count = group < groups ? __popc(group_bits(index, row, group)) : 0;
    const int32_t sum = sum_so_far(count);
    if (group < groups) ranks[row * groups + group] = before + sum - count;
    before += __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
  }
  if (lane == 0) index.row_pointers[row] = before;
}

// A thread per column, blockIdx.y a range of rows: how many entries they keep. Column by column, so
// that prefix sums over all counts are where each begins.
__global__ void __launch_bounds__(kThreads)
    count_columns_kernel(const __grid_constant__ PatternIndex index, int64_t chunk_rows,
                         int32_t* counts) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= index.width) return;
  const int64_t begin = int64_t(blockIdx.y) * chunk_rows;
  const int64_t end = begin + chunk_rows < index.rows ? begin + chunk_rows : index.rows;
  int32_t count = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t bit = row * index.width + column;
    count += index.bits[bit / 8] >> (bit % 8) & 1;
  }
  counts[column * gridDim.y + blockIdx.y] = count;
}

// One block: every value becomes the sum of those in front of it; the sum of all goes to `total`,
// and behind the values if `ends`.
__global__ void __launch_bounds__(kThreads)
    prefix_sums_kernel(int32_t* values, int64_t count, bool ends, int64_t* total) {
  __shared__ int64_t warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t before = 0;
  for (int64_t first = 0; first < count; first += kThreads * kScanned) {
    const int64_t begin = first + int64_t(threadIdx.x) * kScanned;
    int64_t own = 0;
    int32_t held[kScanned];
#pragma unroll
    for (int i = 0; i < kScanned; ++i) {
      held[i] = begin + i < count ? values[begin + i] : 0;
      own += held[i];
    }
    const int64_t sum = sum_so_far(own);
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int64_t place = before + sum - own;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) place += warp_sums[i];
      before += warp_sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kScanned; ++i) {
      if (begin + i < count) values[begin + i] = int32_t(place);
      place += held[i];
    }
  }
  if (threadIdx.x != 0) return;
  if (ends) values[count] = int32_t(before);
  if (total != nullptr) *total = before;
}

// A warp per row: its entries, 32 columns at a time.
__global__ void __launch_bounds__(kThreads)
    list_rows_kernel(const __grid_constant__ PatternIndex index) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= index.rows) return;
  const int64_t groups = groups_of(index.width);
  int32_t place = index.row_pointers[row];
  for (int64_t group = 0; group < groups; ++group) {
    const unsigned bits = group_bits(index, row, group);
    if (bits >> lane & 1) {
      index.columns[place + __popc(bits & ((1u << lane) - 1))] = int32_t(group * kGroup + lane);
    }
    place += __popc(bits);
  }
}

// A thread per column, blockIdx.y a range of rows: their entries in the order of the columns.
__global__ void __launch_bounds__(kThreads)
    list_columns_kernel(const __grid_constant__ PatternIndex index, int64_t chunk_rows,
                        const int32_t* ranks, const int32_t* places, int32_t kept) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= index.width) return;
  const int64_t begin = int64_t(blockIdx.y) * chunk_rows;
  const int64_t end = begin + chunk_rows < index.rows ? begin + chunk_rows : index.rows;
  const int64_t groups = groups_of(index.width), group = column / kGroup;
  int32_t place = places[column * gridDim.y + blockIdx.y];
  if (blockIdx.y == 0) index.column_pointers[column] = place;
  if (blockIdx.y == 0 && column + 1 == index.width) index.column_pointers[index.width] = kept;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t bit = row * index.width + column;
    if (!(index.bits[bit / 8] >> (bit % 8) & 1)) continue;
    const unsigned below = group_bits(index, row, group) & ((1u << column % kGroup) - 1);
    index.column_rows[place] = int32_t(row);
    index.permutation[place++] =
        index.row_pointers[row] + ranks[row * groups + group] + __popc(below);
  }
}

unsigned blocks_of(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

}  // namespace

cudaError_t launch_pack_mask(const bool* mask, int64_t count, uint8_t* bits, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch(pack_kernel, dim3(blocks_of(count, 8 * kThreads)), dim3(kThreads), 0, stream, mask,
                count, bits);
}

int64_t pattern_workspace_length(int64_t rows, int64_t width) {
  return rows * groups_of(width) + width * chunks_of(rows).count;
}

cudaError_t launch_pattern_counts(const PatternIndex& index, int64_t* kept, cudaStream_t stream) {
  const Chunks chunks = chunks_of(index.rows);
  int32_t* ranks = index.workspace;
  int32_t* counts = ranks + index.rows * groups_of(index.width);
  cudaError_t error = launch(count_rows_kernel, dim3(blocks_of(index.rows, kWarps)), dim3(kThreads),
                             0, stream, index, ranks);
  if (error != cudaSuccess) return error;
  error = launch(prefix_sums_kernel, dim3(1), dim3(kThreads), 0, stream, index.row_pointers,
                 index.rows, true, kept);
  if (error != cudaSuccess) return error;
  const dim3 grid(blocks_of(index.width, kThreads), unsigned(chunks.count));
  error = launch(count_columns_kernel, grid, dim3(kThreads), 0, stream, index, chunks.rows, counts);
  if (error != cudaSuccess) return error;
  return launch(prefix_sums_kernel, dim3(1), dim3(kThreads), 0, stream, counts,
                index.width * chunks.count, false, static_cast<int64_t*>(nullptr));
}

cudaError_t launch_pattern_lists(const PatternIndex& index, int64_t kept, cudaStream_t stream) {
  const Chunks chunks = chunks_of(index.rows);
  const int32_t* ranks = index.workspace;
  const int32_t* places = ranks + index.rows * groups_of(index.width);
  const cudaError_t error = launch(list_rows_kernel, dim3(blocks_of(index.rows, kWarps)),
                                   dim3(kThreads), 0, stream, index);
  if (error != cudaSuccess) return error;
  const dim3 grid(blocks_of(index.width, kThreads), unsigned(chunks.count));
  return launch(list_columns_kernel, grid, dim3(kThreads), 0, stream, index, chunks.rows, ranks,
                places, int32_t(kept));
}

}  // namespace tscnc::cuda
