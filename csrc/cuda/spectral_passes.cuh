// One pass A'(A X) over a matrix by many blocks, for a few vectors X.
//
// The matrix is cut along its long side into chunks, a block each. A block multiplies its chunk
// with X and the result with the chunk again, while it is in the cache, and leaves its share of A'A
// X to the block that comes last. Which one that is changes nothing: shares are added in their
// order.
//
// A block of kBlock vectors is stored element by element, the vectors side by side.
#pragma once

#include "spectral_matrix.cuh"

namespace tscnc::cuda {

// Lines of the long side whose products a block keeps at the same time.
constexpr int kPassLines = 128;
// A tree of two levels adds the shares.
constexpr int kMostGroups = 16;
constexpr int kMostChunks = kMostGroups * kMostGroups;

// Lines of the long side in a chunk, and how many chunks there are.
__host__ __device__ __forceinline__ int chunk_lines(const SpectralJob& job) {
  const int windows = int((larger_side(job) + kPassLines - 1) / kPassLines);
  return kPassLines * ((windows + kMostChunks - 1) / kMostChunks);
}
__host__ __device__ __forceinline__ int chunk_count(const SpectralJob& job) {
  const int lines = chunk_lines(job);
  const int64_t room = larger_side(job) + lines - 1;
  return int(lines == kPassLines ? room / kPassLines : room / lines);
}

// The tree that adds the shares of a matrix's chunks.
struct ShareTree {
  int chunks, group, groups;

  __device__ explicit ShareTree(const SpectralJob& job) : chunks(chunk_count(job)), group(1) {
    while (group * group < chunks) ++group;
    groups = (chunks + group - 1) / group;
  }
  __device__ int members(int of_group) const { return min(group, chunks - of_group * group); }
};

// A part of the stored matrix.
struct Region {
  int64_t row, rows, col, cols;
};

// Where a block of products goes: a copy near by, null for none, and one that the others read.
struct ProductSink {
  double *near, *far;
  bool adds;  // to what is there

  __device__ void put(int64_t at, double value) const {
    if (near != nullptr) near[at] = value;
    far[at] = adds ? far[at] + value : value;
  }
};

// Sums of kCount values over the lanes of a warp: lane i gets that of value i % kCount. A step
// hands on half of the values that are left, so that it takes kCount and not 5 kCount shuffles.
template <int kCount>
__device__ __forceinline__ double fold_sum(double (&values)[kCount]) {
  static_assert(kCount <= kWarpSize && (kCount & (kCount - 1)) == 0, "a power of two");
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (offset >= kCount) {
        values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
      } else if (i < offset) {
        const double kept = upper ? values[i + offset] : values[i];
        const double sent = upper ? values[i] : values[i + offset];
        values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, offset);
      }
    }
  }
  return values[0];
}

// An element of each vector of a block, by 128-bit loads.
template <int kBlock>
__device__ __forceinline__ void load_elements(const double* block, int64_t at,
                                              double (&elements)[kBlock]) {
#pragma unroll
  for (int q = 0; q < kBlock; q += 2) {
    const double2 both = *reinterpret_cast<const double2*>(block + at * kBlock + q);
    elements[q] = both.x;
    elements[q + 1] = both.y;
  }
}

// The region times x, a vector block over its columns; a warp takes 32 / kBlock rows at a time.
template <int kBlock>
TSCNC_CALLED void multiply_region_rows(const SpectralJob& job, const Region& region,
                                       const double* x, const ProductSink& sink) {
  constexpr int kRows = kWarpSize / kBlock;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  with_storage(job.dtype, [&](auto storage) {
    for (int64_t first = warp * kRows; first < region.rows; first += kSpectralWarps * kRows) {
      double sums[kWarpSize] = {};
      for (int64_t col = lane; col < region.cols; col += kWarpSize) {
        double factor[kBlock];
        load_elements(x, col, factor);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r >= region.rows) continue;
          const int64_t at = (region.row + first + r) * job.cols + region.col + col;
          const double entry = entry_of<decltype(storage)>(job, at);
#pragma unroll
          for (int q = 0; q < kBlock; ++q) sums[r * kBlock + q] += entry * factor[q];
        }
      }
      const double sum = fold_sum(sums);
      if (first + lane / kBlock < region.rows) sink.put(first * kBlock + lane, sum);
    }
  });
}

// The transposed region times y, a vector block over its rows; a thread per column, or several that
// share its rows. parts: kBlock elements of shared memory per thread.
template <int kBlock>
TSCNC_CALLED void multiply_region_columns(const SpectralJob& job, const Region& region,
                                          const double* y, double* parts, const ProductSink& sink) {
  const int thread = threadIdx.x;
  for (int64_t first = 0; first < region.cols; first += kSpectralThreads) {
    const int width = int(min(int64_t(kSpectralThreads), region.cols - first));
    const int sharers = kSpectralThreads / width, share = thread / width;
    double sums[kBlock] = {};
    with_storage(job.dtype, [&](auto storage) {
      const int64_t col = region.col + first + thread % width;
#pragma unroll 8
      for (int64_t row = share; row < region.rows && share < sharers; row += sharers) {
        const double entry = entry_of<decltype(storage)>(job, (region.row + row) * job.cols + col);
        double factor[kBlock];
        load_elements(y, row, factor);
#pragma unroll
        for (int q = 0; q < kBlock; ++q) sums[q] += entry * factor[q];
      }
    });
    __syncthreads();
    for (int q = 0; q < kBlock; ++q) parts[thread * kBlock + q] = sums[q];
    __syncthreads();
    for (int q = 0; q < kBlock && thread < width; ++q) {
      double sum = 0;
      for (int i = 0; i < sharers; ++i) sum += parts[(i * width + thread) * kBlock + q];
      sink.put((first + thread) * kBlock + q, sum);
    }
  }
  __syncthreads();
}

// A chunk and where its products go. In shared memory, so that it takes no registers.
struct ChunkPass {
  int64_t begin, end;  // lines of the long side
  const double* x;
  double *images, *share;  // the lines of Y = A X, and the chunk's share of A'Y
};

// lines, parts: shared memory.
template <int kBlock>
TSCNC_CALLED void pass_over_chunk(const SpectralJob& job, const ChunkPass& pass, double* lines,
                                  double* parts) {
  const bool wide = job.rows < job.cols;
  for (int64_t first = pass.begin; first < pass.end; first += kPassLines) {
    const int64_t count = min(int64_t(kPassLines), pass.end - first);
    const Region region =
        wide ? Region{0, job.rows, first, count} : Region{first, count, 0, job.cols};
    const ProductSink forth = {lines, pass.images + first * kBlock, false};
    const ProductSink back = {nullptr, pass.share, first > pass.begin};
    if (wide) {
      multiply_region_columns<kBlock>(job, region, pass.x, parts, forth);
      multiply_region_rows<kBlock>(job, region, lines, back);
    } else {
      multiply_region_rows<kBlock>(job, region, pass.x, forth);
      __syncthreads();
      multiply_region_columns<kBlock>(job, region, lines, parts, back);
    }
    __syncthreads();
  }
}

// Blocks wait for others only if these took their tickets before, and so run already: however few
// run at a time, none waits for one that cannot start.

// Waits until the counter has reached `wanted`, and returns it to every thread.
__device__ __forceinline__ int wait_for(int32_t* counter, int wanted, int* seen) {
  if (threadIdx.x == 0) {
    int value;
    while ((value = *static_cast<volatile int32_t*>(counter)) < wanted) __nanosleep(64);
    __threadfence();
    *seen = value;
  }
  __syncthreads();
  return *seen;
}

// Lets the others see what this block has written, then the counter's new value.
__device__ __forceinline__ void publish(int32_t* counter, int value) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicExch(counter, value);
  }
}

// Whether this block is the last of `count` to arrive, time after time. It sees what they wrote.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int count, int* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = (atomicAdd(counter, 1) + 1) % count == 0;
    __threadfence();
  }
  __syncthreads();
  return *is_last != 0;
}

}  // namespace tscnc::cuda
