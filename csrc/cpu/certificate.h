// Two-sided bounds of the extreme singular values that hold in spite of rounding. One side is |Av|
// / |v|; the other is a Cholesky factorisation that succeeds: t I - A'A > 0 proves sigma_max^2 <=
// t, A'A - s I > 0 proves sigma_min^2 >= s. Charged to the shift: the rounded Gram matrix, m u
// |A|_F^2, and the factorisation, (n + 1) u trace (Demmel 1989; Rump 2006), with slack.
#pragma once

#include <initializer_list>

#include "extreme_vectors.h"

namespace tscnc::TSCNC_ISA {

struct Interval {
  double lower, upper;
};

struct CertificateInput {
  const double* gram;
  double* factor;  // symmetric_size(n) scratch
  double* packed;
  int64_t m, n, ld;
  double trace;  // |A|_F^2 as computed
};

// factor := sign * gram + shift * I, then whether it factors.
inline bool positive_definite(const CertificateInput& in, double sign, double shift) {
  const int64_t size = symmetric_size(in.n);
  for (int64_t i = 0; i < size; ++i) in.factor[i] = sign * in.gram[i];
  for (int64_t i = 0; i < in.n; ++i) in.factor[i * in.ld + i] += shift;
  return cholesky(in.factor, in.ld, in.n, in.packed);
}

inline double gram_charge(const CertificateInput& in) {
  return 1.01 * static_cast<double>(in.m + in.n + 32) * kUnit * in.trace + 0x1p-960;
}

// What |Av| may be off by, for |v| = 1.
inline double product_charge(const CertificateInput& in) {
  return 1.01 * static_cast<double>(in.m + in.n + 32) * kUnit * std::sqrt(in.trace);
}

inline Interval certify_largest(const CertificateInput& in, double sigma) {
  const double lower = sigma - product_charge(in);
  const double n = static_cast<double>(in.n);
  Interval result = {lower > 0 ? lower : 0, std::sqrt(in.trace * 1.01)};
  for (const double slack : {1e-6, 1e-4, 1e-2, 1e-1}) {
    const double square = sigma * sigma * (1 + slack) * (1 + slack);
    const double charge = gram_charge(in) + (n + 32) * n * kUnit * square;
    if (positive_definite(in, -1, square - charge)) {
      const double upper = std::sqrt(square) * (1 + 4 * kUnit);
      if (upper < result.upper) result.upper = upper;
      break;
    }
  }
  return result;
}

// For a matrix of full column rank, or of unknown rank.
inline Interval certify_smallest(const CertificateInput& in, double sigma) {
  Interval result = {0, sigma + product_charge(in)};
  const double square = sigma * sigma, charge = gram_charge(in);
  const double least = 2 * charge > 2e-6 * square ? 2 * charge : 2e-6 * square;
  for (const double slack : {1.0, 30.0, 900.0}) {
    const double proven = square - slack * least;
    if (!(proven > 0)) break;
    if (positive_definite(in, 1, -(proven + charge))) {
      result.lower = std::sqrt(proven) * (1 - 4 * kUnit);
      break;
    }
  }
  return result;
}

}  // namespace tscnc::TSCNC_ISA
