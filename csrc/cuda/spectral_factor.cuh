// Cholesky factor and explicit inverse of a triangle in shared memory, by one block.
//
// A lower triangle is stored row by row without gaps. Blocks of kFactorBlock columns: one warp
// factors a diagonal block, which is a chain of square roots; all threads share the rest.
#pragma once

#include "spectral_matrix.cuh"

namespace tscnc::cuda {

constexpr int kFactorBlock = 16;
constexpr int kFactorTile = 4;
static_assert(kFactorBlock * kFactorBlock == kSpectralThreads, "a thread per element of a block");

__host__ __device__ __forceinline__ int triangle_size(int n) { return n * (n + 1) / 2; }
__device__ __forceinline__ double* triangle_line(double* triangle, int row) {
  return triangle + row * (row + 1) / 2;
}

// The diagonal block of `width` columns from `begin` on, by one warp. A pivot that is not above
// `floor` is raised to it, or fails where floor is 0.
__device__ __forceinline__ bool factor_diagonal(double* f, int begin, int width, double floor) {
  const int lane = threadIdx.x % kWarpSize;
  double* own = triangle_line(f, begin + (lane < width ? lane : 0)) + begin;
  for (int c = 0; c < width; ++c) {
    const double* pivot_row = triangle_line(f, begin + c) + begin;
    double value = 0;
    if (lane >= c && lane < width) {
      value = own[c];
      for (int p = 0; p < c; ++p) value -= own[p] * pivot_row[p];
    }
    double pivot = __shfl_sync(0xffffffffu, value, c);
    if (!(pivot > floor)) {
      if (floor == 0) return false;
      pivot = floor;
    }
    const double root = sqrt(pivot);
    if (lane >= c && lane < width) own[c] = lane == c ? root : value / root;
    __syncwarp();
  }
  return true;
}

// Subtracts the products of the columns [begin, next) from what lies behind them.
__device__ __forceinline__ void update_trailing(double* f, int begin, int next, int n) {
  const int blocks = (n - next + kFactorTile - 1) / kFactorTile;
  for (int tile = threadIdx.x; tile < triangle_size(blocks); tile += kSpectralThreads) {
    const int block = triangle_row(tile);
    const int top = next + kFactorTile * block;
    const int left = next + kFactorTile * (tile - triangle_size(block));
    const double *a[kFactorTile], *b[kFactorTile];
#pragma unroll
    for (int i = 0; i < kFactorTile; ++i) {
      // Rows beyond the last are copies of it, and not stored.
      a[i] = triangle_line(f, min(top + i, n - 1)) + begin;
      b[i] = triangle_line(f, min(left + i, n - 1)) + begin;
    }
    double sum[kFactorTile][kFactorTile] = {};
    for (int p = 0; p < kFactorBlock; ++p) {
      double left_value[kFactorTile];
#pragma unroll
      for (int j = 0; j < kFactorTile; ++j) left_value[j] = b[j][p];
#pragma unroll
      for (int i = 0; i < kFactorTile; ++i) {
        const double top_value = a[i][p];
#pragma unroll
        for (int j = 0; j < kFactorTile; ++j) sum[i][j] += top_value * left_value[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kFactorTile; ++i) {
#pragma unroll
      for (int j = 0; j < kFactorTile; ++j) {
        if (top + i < n && left + j <= top + i) {
          triangle_line(f, top + i)[left + j] -= sum[i][j];
        }
      }
    }
  }
}

// In place L with L L' = the symmetric matrix in f; false where a pivot fails (see above). The same
// for every thread.
TSCNC_CALLED bool cholesky(double* f, int n, double floor) {
  for (int begin = 0; begin < n; begin += kFactorBlock) {
    const int width = min(kFactorBlock, n - begin), next = begin + width;
    __syncthreads();
    const bool is_good = threadIdx.x >= kWarpSize || factor_diagonal(f, begin, width, floor);
    if (!__syncthreads_and(is_good)) return false;
    for (int row = next + int(threadIdx.x); row < n; row += kSpectralThreads) {
      double* line = triangle_line(f, row) + begin;
      double solved[kFactorBlock];
#pragma unroll
      for (int c = 0; c < kFactorBlock; ++c) {
        const double* diagonal = triangle_line(f, begin + c) + begin;
        double value = line[c];
#pragma unroll
        for (int p = 0; p < c; ++p) value -= solved[p] * diagonal[p];
        line[c] = solved[c] = value / diagonal[c];
      }
    }
    __syncthreads();
    update_trailing(f, begin, next, n);
  }
  __syncthreads();
  return true;
}

// Inverts the diagonal blocks, a warp each, a column per lane.
__device__ __forceinline__ void invert_diagonal_blocks(double* f, int n) {
  const int lane = threadIdx.x % kWarpSize;
  for (int begin = int(threadIdx.x) / kWarpSize * kFactorBlock; begin < n;
       begin += kSpectralWarps * kFactorBlock) {
    const int width = min(kFactorBlock, n - begin);
    double column[kFactorBlock];
#pragma unroll
    for (int r = 0; r < kFactorBlock; ++r) {
      column[r] = 0;
      if (r >= width || r < lane) continue;
      const double* row = triangle_line(f, begin + r) + begin;
      double value = r == lane ? 1 : 0;
#pragma unroll
      for (int p = 0; p < r; ++p) value -= row[p] * column[p];
      column[r] = value / row[r];
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kFactorBlock; ++r) {
      if (r < width && r >= lane) triangle_line(f, begin + r)[begin + lane] = column[r];
    }
  }
}

// In place L^-1, block row by block row: X_ij = -L_ii^-1 sum_k L_ik X_kj.
TSCNC_CALLED void invert_triangle(double* f, int n) {
  constexpr int kBlocks = kSmallSide / kFactorBlock;
  __syncthreads();
  invert_diagonal_blocks(f, n);
  __syncthreads();
  const int r = threadIdx.x / kFactorBlock, c = threadIdx.x % kFactorBlock;
  for (int begin = kFactorBlock; begin < n; begin += kFactorBlock) {
    const bool is_row = begin + r < n;
    double* own = triangle_line(f, is_row ? begin + r : begin);
    double sum[kBlocks] = {};
    for (int k = 0; k < begin; ++k) {
      const double weight = own[k];
      const double* row = triangle_line(f, k);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int col = block * kFactorBlock + c;
        if (col <= k) sum[block] += weight * row[col];
      }
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (is_row && block * kFactorBlock < begin) own[block * kFactorBlock + c] = sum[block];
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      sum[block] = 0;
      if (!is_row || block * kFactorBlock >= begin) continue;
      for (int p = 0; p <= r; ++p) {
        sum[block] -= own[begin + p] * triangle_line(f, begin + p)[block * kFactorBlock + c];
      }
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (is_row && block * kFactorBlock < begin) own[block * kFactorBlock + c] = sum[block];
    }
    __syncthreads();
  }
}

}  // namespace tscnc::cuda
