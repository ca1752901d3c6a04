// Two-sided bounds that hold in spite of rounding, as csrc/cpu/certificate.h has them: one side is
// |A v|, the other a shifted Cholesky factorisation that succeeds (Demmel 1989; Rump 2006).
#pragma once

#include "spectral_block.cuh"

namespace tscnc::cuda {

constexpr double kUnit = 0x1p-53;

struct SpectralInterval {
  double lower, upper;
};

// factor := sign * G + shift I; whether it factors.
__device__ __forceinline__ bool positive_definite(const SpectralProblem& p, double sign,
                                                  double shift) {
  __syncthreads();
  for (int i = threadIdx.x; i < triangle_size(p.n); i += kSpectralThreads) {
    const int row = triangle_row(i), col = i - triangle_size(row);
    p.factor[i] = sign * p.gram[row * p.n + col] + (row == col ? shift : 0);
  }
  return cholesky(p.factor, p.n, 0);
}

// bounds: intervals of sigma_max, sigma_min and kappa, by all threads alike. deficiency: of what is
// kept of the pattern.
__device__ __forceinline__ void certify(const SpectralProblem& p, int64_t m, double trace,
                                        double largest, double smallest, int deficiency,
                                        bool wants_full_rank, double scale, double* bounds) {
  const double n = p.n, size = double(m) + n + 32;
  const double gram_charge = 1.01 * size * kUnit * trace + 0x1p-960;
  const double product_charge = 1.01 * size * kUnit * sqrt(trace);
  SpectralInterval most = {fmax(largest - product_charge, 0.0), sqrt(trace * 1.01)};
  for (const double slack : {1e-6, 1e-4, 1e-2, 1e-1}) {
    const double square = largest * largest * (1 + slack) * (1 + slack);
    const double charge = gram_charge + (n + 32) * n * kUnit * square;
    if (!positive_definite(p, -1, square - charge)) continue;
    most.upper = fmin(most.upper, sqrt(square) * (1 + 4 * kUnit));
    break;
  }
  SpectralInterval least = {0, 0};
  if (deficiency == 0) {
    least.upper = smallest + product_charge;
    const double square = smallest * smallest;
    const double step = fmax(2 * gram_charge, 2e-6 * square);
    for (const double slack : {1.0, 30.0, 900.0}) {
      const double proven = square - slack * step;
      if (!(proven > 0)) break;
      if (!positive_definite(p, 1, -(proven + gram_charge))) continue;
      least.lower = sqrt(proven) * (1 - 4 * kUnit);
      break;
    }
  } else if (!wants_full_rank) {
    // Beside a null space one vector bounds nothing from above.
    least.upper = most.upper;
  }
  if (threadIdx.x != 0) return;
  const double ratio =
      least.upper > 0 ? most.lower / least.upper * (1 - 4 * kUnit) : double(INFINITY);
  bounds[0] = most.lower / scale;
  bounds[1] = most.upper / scale;
  bounds[2] = least.lower / scale;
  bounds[3] = least.upper / scale;
  bounds[4] = ratio > 1 ? ratio : 1;
  bounds[5] = least.lower > 0 ? most.upper / least.lower * (1 + 4 * kUnit) : double(INFINITY);
}

}  // namespace tscnc::cuda
