// What the blocks of a warm launch keep: of a matrix in device memory, of their own in shared
// memory.
#pragma once

#include "spectral_ritz.cuh"

namespace tscnc::cuda {

// kWanted: 2 ends, or 1 for sigma_max alone. A block holds two vectors per end, the first of each
// end first.
template <int kWanted>
struct WarmSizes {
  static constexpr int kBlock = 2 * kWanted, kMostPasses = kRitzRoom / kBlock;

  // Where factorisations are quick and follow, less is worth a try.
  __host__ __device__ static int passes(const SpectralJob& job) {
    return smaller_side(job) <= kSmallSide ? kMostPasses / 2 : kMostPasses;
  }
};

// Parts of a matrix's workspace.
template <int kWanted>
struct WarmWorkspace {
  static constexpr int kBlock = WarmSizes<kWanted>::kBlock;
  double *basis, *images, *lines, *shares, *ritz_vectors, *ritz_values, *weights;

  __host__ __device__ static int64_t size(const SpectralJob& job) {
    const int64_t n = smaller_side(job), room = 2 * kRitzRoom + kBlock;
    return (room + kBlock * chunk_count(job)) * n + kRitzRoom * larger_side(job) +
           kRitzRoom * (kRitzRoom + 1 + kEnds);
  }
  __device__ void place(const SpectralJob& job, double* begin) {
    const int64_t n = smaller_side(job);
    basis = begin;
    images = basis + (kRitzRoom + kBlock) * n;
    shares = images + kRitzRoom * n;
    lines = shares + kBlock * chunk_count(job) * n;
    ritz_vectors = lines + kRitzRoom * larger_side(job);
    ritz_values = ritz_vectors + kRitzRoom * kRitzRoom;
    weights = ritz_values + kRitzRoom;
  }
};

// What one block has to do; phase -1 starts a matrix, the last one writes vectors.
struct WarmTask {
  int job, phase, chunk;
  SpectralPlace place;
};

// All that a block keeps between its steps, whose arithmetic needs the registers.
template <int kWanted>
struct WarmShared {
  static constexpr int kBlock = WarmSizes<kWanted>::kBlock;
  double lines[kPassLines * kBlock], parts[kSpectralThreads * kBlock];
  RitzShared ritz;
  double along[kRitzRoom + kBlock][kBlock];  // products of the space with a block
  double lower[kBlock][kBlock];              // a Cholesky factor
  double value[kBlock], residual[kBlock];    // of the Ritz pairs
  int place[kBlock];                         // and where their weights are
  WarmTask task;
  WarmWorkspace<kWanted> at;
  ChunkPass pass;
  int seen, is_last, failed;
};

}  // namespace tscnc::cuda
