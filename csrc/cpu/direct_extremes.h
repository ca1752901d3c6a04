// Both ends of a Gram matrix without iterating to convergence, for the sizes where a reduction to
// tridiagonal form costs less than two Krylov spaces and a factorisation.
#pragma once

#include "krylov.h"
#include "tridiagonal.h"

namespace tscnc::TSCNC_ISA {

struct DirectResult {
  double values[4];  // largest, second, smallest, second smallest eigenvalue
  int64_t ties[2];   // per end, counted up to n
};

// Copies the upper triangle of g into T, scaled, its diagonal blocks whole.
template <class T>
inline void copy_blocks(const double* g, int64_t ld, int64_t n, double scale, T* a) {
  constexpr int64_t kStep = kLanes<T>;
  for (int64_t i = 0; i < n + kStep; ++i) {
    const int64_t block = i / kStep * kStep;
    for (int64_t j = block; j < i; ++j) a[i * ld + j] = a[j * ld + i];
    for (int64_t j = i; j < ld; ++j) {
      a[i * ld + j] = i < n && j < n ? static_cast<T>(scale * g[i * ld + j]) : 0;
    }
  }
}

// Makes two rows orthonormal, the second zero where n is 1; false where they are almost parallel.
inline bool orthonormalise(double* rows, int64_t ld, int64_t n) {
  double* second = rows + ld;
  if (normalise(rows, ld) == 0) return false;
  if (n == 1) {
    std::memset(second, 0, static_cast<size_t>(ld) * sizeof(double));
    return true;
  }
  if (normalise(second, ld) == 0) return false;
  add_scaled(second, -dot(rows, second, ld), rows, ld);
  return normalise(second, ld) > 0.1;
}

// The two vectors of each end into `top` and `bottom`, two rows each; false where two vectors of
// one end come out parallel. close: relative width of the eigenvalues' intervals. tie_gap: as in
// krylov.h, for the matrix and its inverse. square: symmetric_size(n), scratch: 24 ld.
template <class T>
inline bool direct_extremes(const double* g, int64_t ld, int64_t n, double trace, double close,
                            double tie_gap, double* square, double* scratch, double* top,
                            double* bottom, DirectResult* result) {
  T* a = reinterpret_cast<T*>(square);
  double *d = scratch, *e = d + ld, *squared = e + ld, *z = squared + ld, *pivots = z + 4 * ld;
  T *tau = reinterpret_cast<T*>(pivots + 8 * ld), *vectors = tau + ld, *work = vectors + 4 * ld;
  const double scale = std::ldexp(1.0, -std::ilogb(trace));
  copy_blocks(g, ld, n, scale, a);
  reduce(a, ld, n, d, e, tau, work);
  double bound = 0;
  for (int64_t i = 0; i < n; ++i) {
    squared[i] = e[i] * e[i];
    const double row = d[i] + std::fabs(e[i]) + (i > 0 ? std::fabs(e[i - 1]) : 0);
    if (row > bound) bound = row;
  }
  const SturmSections sections(n, d, squared, bound);
  sections.find(1.001 * bound, close, result->values);
  double shifts[SturmSections::kShifts];
  int64_t counts[SturmSections::kShifts];
  for (int s = 0; s < SturmSections::kShifts; ++s) {
    shifts[s] = s == 0 ? result->values[0] * (1 - tie_gap) : result->values[2] / (1 - tie_gap);
  }
  sections.count(shifts, counts);
  result->ties[0] = counts[0] < n ? n - counts[0] : 1;
  result->ties[1] = counts[1] > 0 ? counts[1] : 1;
  twisted_vectors(n, d, e, squared, result->values, 0x1p-100 * bound, z, ld, pivots);
  if (!orthonormalise(z, ld, n) || !orthonormalise(z + 2 * ld, ld, n)) return false;
  for (int64_t i = 0; i < 4 * ld; ++i) vectors[i] = static_cast<T>(z[i]);
  reflect_back(a, ld, n, tau, vectors);
  for (int64_t i = 0; i < 2 * ld; ++i) {
    top[i] = static_cast<double>(vectors[i]);
    bottom[i] = static_cast<double>(vectors[2 * ld + i]);
  }
  // T's rounding has left vectors of almost length 1.
  if (!orthonormalise(top, ld, n) || !orthonormalise(bottom, ld, n)) return false;
  for (double& value : result->values) value /= scale;
  return true;
}

}  // namespace tscnc::TSCNC_ISA
