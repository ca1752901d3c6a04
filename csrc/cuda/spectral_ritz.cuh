// Ritz pairs of a projected operator of a few dimensions, by one block: Jacobi's method with n / 2
// disjoint rotations at a time.
#pragma once

#include "spectral_passes.cuh"

namespace tscnc::cuda {

// Dimensions of the largest space that passes build.
constexpr int kRitzRoom = 24;

struct RitzShared {
  double operator_[kRitzRoom][kRitzRoom], vectors[kRitzRoom][kRitzRoom];
  double values[kRitzRoom];  // descending; value i is that of column order[i] of `vectors`
  int order[kRitzRoom];
  double cosine[kRitzRoom / 2], sine[kRitzRoom / 2];
  int first[kRitzRoom / 2], second[kRitzRoom / 2];
};

// Pair `index` of round `round` of a tournament in which all meet all in size - 1 rounds.
__device__ __forceinline__ void tournament_pair(int size, int round, int index, int* a, int* b) {
  const int others = size - 1;
  *a = index == 0 ? others : (round + index) % others;
  *b = index == 0 ? round : (round + others - index) % others;
}

// The rotations of a round, a thread each; whether any is worth it.
__device__ __forceinline__ bool choose_rotations(RitzShared& s, int size, int round,
                                                 double negligible) {
  const int pair = threadIdx.x;
  bool turns = false;
  if (pair < size / 2) {
    int a, b;
    tournament_pair(size, round, pair, &a, &b);
    const double off = s.operator_[a][b];
    double tangent = 0;
    turns = fabs(off) > negligible;
    if (turns) {
      const double tau = (s.operator_[b][b] - s.operator_[a][a]) / (2 * off);
      tangent = (tau >= 0 ? 1 : -1) / (fabs(tau) + sqrt(1 + tau * tau));
    }
    s.cosine[pair] = 1 / sqrt(1 + tangent * tangent);
    s.sine[pair] = tangent * s.cosine[pair];
    s.first[pair] = a;
    s.second[pair] = b;
  }
  return __syncthreads_or(turns);
}

// Turns rows and columns of the operator, a thread per pair of rotations, and the vectors.
__device__ __forceinline__ void turn_all(RitzShared& s, int size) {
  const int pairs = size / 2;
  const auto turn = [](double c, double sine, double& x, double& y) {
    const double turned = c * x - sine * y;
    y = sine * x + c * y;
    x = turned;
  };
  for (int i = threadIdx.x; i < pairs * pairs; i += kSpectralThreads) {
    const int row = i / pairs, col = i % pairs;
    double (&top)[kRitzRoom] = s.operator_[s.first[row]];
    double (&bottom)[kRitzRoom] = s.operator_[s.second[row]];
    const int a = s.first[col], b = s.second[col];
    turn(s.cosine[row], s.sine[row], top[a], bottom[a]);
    turn(s.cosine[row], s.sine[row], top[b], bottom[b]);
    turn(s.cosine[col], s.sine[col], top[a], top[b]);
    turn(s.cosine[col], s.sine[col], bottom[a], bottom[b]);
  }
  for (int i = threadIdx.x; i < size * pairs; i += kSpectralThreads) {
    const int row = i / pairs, pair = i % pairs;
    turn(s.cosine[pair], s.sine[pair], s.vectors[row][s.first[pair]],
         s.vectors[row][s.second[pair]]);
  }
  __syncthreads();
}

// The eigenvalues of the symmetric `operator_` of even size, which becomes diagonal, and its
// vectors in the coordinates of `vectors`, which take their place. False, with nothing found, where
// the trace is not finite.
TSCNC_CALLED bool ritz_pairs(RitzShared& s, int size) {
  constexpr int kMostSweeps = 16;
  __syncthreads();
  double trace = 0;
  for (int i = 0; i < size; ++i) trace += s.operator_[i][i];
  if (!isfinite(trace)) return false;
  bool is_open = true;
  for (int sweep = 0; sweep < kMostSweeps && is_open; ++sweep) {
    is_open = false;
    for (int round = 0; round < size - 1; ++round) {
      if (!choose_rotations(s, size, round, 1e-17 * trace)) continue;
      is_open = true;
      turn_all(s, size);
    }
  }
  const int i = threadIdx.x;
  __syncthreads();
  if (i < size) {
    const double value = s.operator_[i][i];
    int place = 0;
    for (int other = 0; other < size; ++other) {
      const double rival = s.operator_[other][other];
      place += rival > value || (rival == value && other < i);
    }
    s.values[place] = value;
    s.order[place] = i;
  }
  __syncthreads();
  return true;
}

}  // namespace tscnc::cuda
