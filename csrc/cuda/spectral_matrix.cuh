// A matrix of a spectral kernel: its entries as double, its Gram matrix, and its products with a
// few vectors.
#pragma once

#include <cuda_runtime.h>

#include "extreme_singular_values.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace tscnc::cuda {

// Functions that are called from several places, so that the kernel stays small.
#define TSCNC_CALLED inline __attribute__((noinline)) __device__

constexpr int kSpectralThreads = 256;
constexpr int kSpectralWarps = kSpectralThreads / kWarpSize;

// The jobs of one launch. The table travels as a kernel parameter (at most 4 KiB), so there is no
// copy to wait for, and a CUDA graph keeps it.
constexpr int kMaxSpectralJobs = 80;

// Where a matrix's vectors are among those of all matrices.
struct SpectralPlace {
  int64_t index = 0, row = 0, col = 0, smaller = 0, workspace = 0;
};

struct SpectralTable {
  SpectralJob jobs[kMaxSpectralJobs];
  SpectralPlace first;  // of the first job
  int count;
};
static_assert(sizeof(SpectralTable) <= 3700, "kernel parameters are limited to 4 KiB");

__host__ __device__ __forceinline__ int64_t smaller_side(const SpectralJob& job) {
  return job.rows < job.cols ? job.rows : job.cols;
}
__host__ __device__ __forceinline__ int64_t larger_side(const SpectralJob& job) {
  return job.rows < job.cols ? job.cols : job.rows;
}

// The place behind the jobs before `index`; workspace(job): elements that a job needs.
template <typename Workspace>
__host__ __device__ __forceinline__ SpectralPlace place_of(const SpectralTable& table, int index,
                                                           const Workspace& workspace) {
  SpectralPlace place = table.first;
  for (int i = 0; i < index; ++i) {
    const SpectralJob& job = table.jobs[i];
    ++place.index;
    place.row += job.rows;
    place.col += job.cols;
    place.smaller += smaller_side(job);
    place.workspace += workspace(job);
  }
  return place;
}

// Calls run(table) for the jobs, kMost at a time, until one reports an error.
template <int kMost = kMaxSpectralJobs, typename Workspace, typename Run>
cudaError_t for_each_table(const SpectralJob* jobs, int64_t count, const Workspace& workspace,
                           const Run& run) {
  SpectralTable table = {};
  for (int64_t first = 0; first < count; first += table.count) {
    table.count = int(count - first < kMost ? count - first : kMost);
    for (int i = 0; i < table.count; ++i) table.jobs[i] = jobs[first + i];
    const cudaError_t error = run(table);
    if (error != cudaSuccess) return error;
    table.first = place_of(table, table.count, workspace);
  }
  return cudaSuccess;
}

// An entry of the masked matrix.
template <typename Storage>
__device__ __forceinline__ double entry_of(const SpectralJob& job, int64_t at) {
  if (job.mask != nullptr && !job.mask[at]) return 0;
  return static_cast<double>(static_cast<Math<Storage>>(static_cast<const Storage*>(job.data)[at]));
}

// Calls function(storage value) for the matrix's storage type.
template <typename Function>
__device__ __forceinline__ void with_storage(DType dtype, const Function& function) {
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
}

// The largest magnitude of the entries, leaving NaN out; every thread gets it. sums: a double per
// warp.
__device__ __forceinline__ double largest_magnitude(const SpectralJob& job, double* sums) {
  double largest = 0;
  with_storage(job.dtype, [&](auto storage) {
    const int64_t count = int64_t(job.rows) * job.cols;
    for (int64_t at = threadIdx.x; at < count; at += kSpectralThreads) {
      largest = fmax(largest, fabs(entry_of<decltype(storage)>(job, at)));
    }
  });
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  for (int warp = 0; warp < kSpectralWarps; ++warp) largest = fmax(largest, sums[warp]);
  return largest;
}

// Row of the lower triangle, stored row by row, that holds element `index`.
__device__ __forceinline__ int triangle_row(int index) {
  int row = int((sqrtf(8.0f * float(index) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return row;
}

// A thread's tile of the Gram matrix: kSmallSide has 253 such tiles in its lower triangle.
constexpr int kGramTile = 6;
constexpr int kGramWidth = (kSmallSide + kGramTile - 1) / kGramTile * kGramTile;
constexpr int kGramDepth = 16;

// Rows [first, first + kGramDepth) of the matrix seen tall, zero beyond it.
template <typename Storage>
__device__ __forceinline__ void load_panel(const SpectralJob& job, double scale, int64_t first,
                                           double (*panel)[kGramWidth]) {
  const bool wide = job.rows < job.cols;
  const int n = int(smaller_side(job));
  const int64_t m = larger_side(job);
  for (int i = threadIdx.x; i < kGramDepth * kGramWidth; i += kSpectralThreads) {
    // Neighbouring threads read neighbouring entries, whichever way the matrix is stored.
    const int k = wide ? i % kGramDepth : i / kGramWidth;
    const int j = wide ? i / kGramDepth : i % kGramWidth;
    const int64_t row = first + k;
    const bool inside = row < m && j < n;
    panel[k][j] =
        inside ? scale * entry_of<Storage>(job, wide ? j * m + row : row * int64_t(n) + j) : 0;
  }
}

// A tile's share of a row, by 128-bit loads.
__device__ __forceinline__ void load_tile(const double* row, double (&values)[kGramTile]) {
#pragma unroll
  for (int i = 0; i < kGramTile; i += 2) {
    const double2 both = *reinterpret_cast<const double2*>(row + i);
    values[i] = both.x;
    values[i + 1] = both.y;
  }
}

// gram := scale^2 A'A, both triangles, n x n in global memory. panel: kGramDepth rows.
TSCNC_CALLED void form_gram(const SpectralJob& job, double scale, double (*panel)[kGramWidth],
                            double* gram) {
  const int n = int(smaller_side(job));
  const int64_t m = larger_side(job);
  const int blocks = (n + kGramTile - 1) / kGramTile, tiles = blocks * (blocks + 1) / 2;
  // Threads without a tile of their own take a share of another's rows.
  const int groups = min(8, kSpectralThreads / tiles);
  const int tile = int(threadIdx.x) % tiles, group = int(threadIdx.x) / tiles;
  const int row = triangle_row(tile);
  const int top = kGramTile * row, left = kGramTile * (tile - row * (row + 1) / 2);
  double sum[kGramTile][kGramTile] = {};
  for (int64_t first = 0; first < m; first += kGramDepth) {
    __syncthreads();
    with_storage(job.dtype,
                 [&](auto storage) { load_panel<decltype(storage)>(job, scale, first, panel); });
    __syncthreads();
    for (int k = group; k < kGramDepth && group < groups; k += groups) {
      double a[kGramTile], b[kGramTile];
      load_tile(panel[k] + top, a);
      load_tile(panel[k] + left, b);
#pragma unroll
      for (int i = 0; i < kGramTile; ++i) {
#pragma unroll
        for (int j = 0; j < kGramTile; ++j) sum[i][j] += a[i] * b[j];
      }
    }
  }
  for (int turn = 0; turn < groups; ++turn) {
    __syncthreads();
    if (group != turn) continue;
#pragma unroll
    for (int i = 0; i < kGramTile; ++i) {
#pragma unroll
      for (int j = 0; j < kGramTile; ++j) {
        if (top + i >= n || left + j > top + i) continue;
        double* place = gram + (top + i) * n + left + j;
        const double total = turn == 0 ? sum[i][j] : *place + sum[i][j];
        *place = gram[(left + j) * n + top + i] = total;
      }
    }
  }
  __syncthreads();
}

// y[q] := scale W x[q] for kVectors vectors, strides over the columns (x) and the rows (y); a warp
// per row.
template <int kVectors>
__device__ __forceinline__ void multiply_rows(const SpectralJob& job, double scale, const double* x,
                                              int64_t x_stride, double* y, int64_t y_stride) {
  const int lane = threadIdx.x % kWarpSize;
  with_storage(job.dtype, [&](auto storage) {
    for (int64_t row = threadIdx.x / kWarpSize; row < job.rows; row += kSpectralWarps) {
      double sum[kVectors] = {};
      for (int64_t col = lane; col < job.cols; col += kWarpSize) {
        const double entry = scale * entry_of<decltype(storage)>(job, row * job.cols + col);
#pragma unroll
        for (int q = 0; q < kVectors; ++q) sum[q] += entry * x[q * x_stride + col];
      }
#pragma unroll
      for (int q = 0; q < kVectors; ++q) {
        const double total = warp_sum(sum[q]);
        if (lane == 0) y[q * y_stride + row] = total;
      }
    }
  });
}

// x[q] := scale W' y[q]; a thread per column, which sums over the rows.
template <int kVectors>
__device__ __forceinline__ void multiply_columns(const SpectralJob& job, double scale,
                                                 const double* y, int64_t y_stride, double* x,
                                                 int64_t x_stride) {
  with_storage(job.dtype, [&](auto storage) {
    for (int64_t col = threadIdx.x; col < job.cols; col += kSpectralThreads) {
      double sum[kVectors] = {};
#pragma unroll 4
      for (int64_t row = 0; row < job.rows; ++row) {
        const double entry = scale * entry_of<decltype(storage)>(job, row * job.cols + col);
#pragma unroll
        for (int q = 0; q < kVectors; ++q) sum[q] += entry * y[q * y_stride + row];
      }
#pragma unroll
      for (int q = 0; q < kVectors; ++q) x[q * x_stride + col] = sum[q];
    }
  });
}

}  // namespace tscnc::cuda
