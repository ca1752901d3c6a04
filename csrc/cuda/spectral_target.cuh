// Where one matrix's results go, and what its flags say.
#pragma once

#include "spectral_block.cuh"

namespace tscnc::cuda {

// Bits of `flags`, as on the CPU.
constexpr int64_t kRankDeficient = 1, kShifted = 2, kCapReached = 4;
// A larger estimated error of a singular value raises kCapReached.
constexpr double kPromisedError = 1e-3;

// What one block writes, and where.
struct SpectralTarget {
  const SpectralOutputs& out;
  const SpectralPlace& place;
  const SpectralJob& job;
  bool is_certified;

  __device__ double* left(int end) const { return out.left + end * out.rows + place.row; }
  __device__ double* right(int end) const { return out.right + end * out.cols + place.col; }
  __device__ double* block(int row) const { return out.block + row * out.smaller + place.smaller; }

  __device__ void clear() const {
    for (int end = 0; end < kEnds; ++end) {
      for (int64_t i = threadIdx.x; i < job.rows; i += kSpectralThreads) left(end)[i] = 0;
      for (int64_t i = threadIdx.x; i < job.cols; i += kSpectralThreads) right(end)[i] = 0;
    }
    const int64_t n = smaller_side(job);
    for (int64_t i = threadIdx.x; i < 2 * kTiedRows * n; i += kSpectralThreads) {
      block(int(i / n))[i % n] = 0;
    }
    __syncthreads();
  }

  // By thread 0.
  __device__ void write_end(int end, double sigma, double residual, int ties) const {
    out.sigma[end * out.count + place.index] = sigma;
    out.residual[2 * place.index + end] = residual;
    out.ties[2 * place.index + end] = ties;
  }

  // A matrix without a spectrum: zero, or not finite.
  __device__ void write_degenerate(double value, int64_t flags, bool largest_only) const {
    for (int end = 0; end < (largest_only ? 1 : kEnds); ++end) {
      for (int64_t i = threadIdx.x; i < job.rows; i += kSpectralThreads) left(end)[i] = value;
      for (int64_t i = threadIdx.x; i < job.cols; i += kSpectralThreads) right(end)[i] = value;
    }
    if (threadIdx.x != 0) return;
    for (int end = 0; end < kEnds; ++end) {
      const double known = end == 1 && largest_only ? 0 : value;
      write_end(end, known, known, 1);
    }
    out.flags[place.index] = flags;
    double* bounds = out.bounds + 6 * place.index;
    for (int i = 0; i < 6 && is_certified; ++i) bounds[i] = i < 4 ? value : value + INFINITY;
  }

  // Two vectors per end, for the next call to start from.
  __device__ void write_state() const {
    __syncthreads();
    const int64_t n = smaller_side(job);
    for (int64_t i = threadIdx.x; i < 4 * n; i += kSpectralThreads) {
      const int64_t row = i / n, j = i % n;
      out.state[row * out.smaller + place.smaller + j] =
          block(int(row / 2 * kTiedRows + row % 2))[j];
    }
  }
};

}  // namespace tscnc::cuda
