// Both ends of a Gram matrix without iterating to convergence, for the sizes where a reduction to
// tridiagonal form costs less than two Krylov spaces and a factorisation.
#pragma once

#include "krylov.h"
#include "tridiagonal.h"

namespace tscnc::TSCNC_ISA {

// Scratch of direct_extremes: fp64 elements besides symmetric_size(n).
constexpr int64_t direct_scratch(int64_t ld) { return 28 * ld; }

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

// The two vectors of each end into `top` and `bottom`, two rows each; false where two vectors of
// one end come out parallel. close: relative width of the eigenvalues' intervals. tie_gap: as in
// krylov.h, for the matrix and its inverse.
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
  for (int q = 0; q < 4; ++q) {
    double* row = z + q * ld;
    if (q % 2 == 1 && n == 1) std::memset(row, 0, static_cast<size_t>(ld) * sizeof(double));
    if (q % 2 == 1 && n == 1) break;
    bool usable = normalise(row, ld) > 0;
    if (q % 2 == 1) {
      add_scaled(row, -dot(row - ld, row, ld), row - ld, ld);
      usable = usable && normalise(row, ld) > 0.1;
    }
    if (!usable) return false;
  }
  for (int64_t i = 0; i < 4 * ld; ++i) vectors[i] = static_cast<T>(z[i]);
  reflect_back(a, ld, n, tau, vectors);
  for (int64_t i = 0; i < 2 * ld; ++i) {
    top[i] = static_cast<double>(vectors[i]);
    bottom[i] = static_cast<double>(vectors[2 * ld + i]);
  }
  for (double& value : result->values) value /= scale;
  return true;
}

}  // namespace tscnc::TSCNC_ISA
