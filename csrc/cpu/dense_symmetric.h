// Dense symmetric fp64 algebra for the spectral kernels: Cholesky, triangular solves and
// matrix-vector products for two vectors at a time.
//
// Layout: a symmetric or triangular n x n matrix is row-major with leading dimension ld =
// padded_length(n); only the upper triangle is meaningful, what lies below the diagonal is scratch.
// Columns n..ld-1 are zero, which lets every loop run on whole vectors, and kPadding rows follow
// the last one. Vectors hold ld elements, zero behind the n-th.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rank_update.h"

namespace tscnc::TSCNC_ISA {

using VecD = Vec<double>;
constexpr int64_t kWidth = kLanes<double>;
constexpr int64_t kStrip = kStripOf<double>;
constexpr int64_t kPadding = 24;
// Rows that one step of the Cholesky takes.
constexpr int64_t kFactorRows = 32;

// An odd number of cache lines, so that the rows of a panel fall into different cache sets.
inline int64_t padded_length(int64_t n) { return ((n + kPadding + 7) / 8 | 1) * 8; }

inline int64_t symmetric_size(int64_t n) { return (n + kPadding) * padded_length(n); }

inline double dot(const double* x, const double* y, int64_t n) {
  VecD sum0 = {}, sum1 = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    sum0 += load(x + i) * load(y + i);
    sum1 += load(x + i + kWidth) * load(y + i + kWidth);
  }
  for (; i < n; i += kWidth) sum0 += load(x + i) * load(y + i);
  return sum_lanes<double>(sum0 + sum1);
}

inline void add_scaled(double* y, double a, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) store(y + i, load(y + i) + a * load(x + i));
}

// Factors the diagonal block of `rows` rows at r; false at a pivot that is not positive.
inline bool factor_diagonal(double* r, int64_t ld, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    double* row = r + i * ld;
    for (int64_t p = 0; p < i; ++p) {
      const double scale = r[p * ld + i];
      for (int64_t j = i; j < rows; ++j) row[j] -= scale * r[p * ld + j];
    }
    if (!(row[i] > 0)) return false;
    const double inverse = 1 / std::sqrt(row[i]);
    for (int64_t j = i; j < rows; ++j) row[j] *= inverse;
  }
  return true;
}

// Rows right of a factored diagonal block: R_kj := R_kk^-T R_kj for `count` columns at `right`.
inline void solve_panel(const double* diagonal, double* right, int64_t ld, int64_t rows,
                        int64_t count) {
  for (int64_t j = 0; j < count; j += kStrip) {
    for (int64_t i = 0; i < rows; ++i) {
      double* row = right + i * ld + j;
      VecD sum[3];
      for (int64_t s = 0; s < 3; ++s) sum[s] = load(row + s * kWidth);
      for (int64_t p = 0; p < i; ++p) {
        const VecD scale = broadcast(diagonal[p * ld + i]);
        const double* solved = right + p * ld + j;
        for (int64_t s = 0; s < 3; ++s) sum[s] -= scale * load(solved + s * kWidth);
      }
      const double inverse = 1 / diagonal[i * ld + i];
      for (int64_t s = 0; s < 3; ++s) store(row + s * kWidth, sum[s] * inverse);
    }
  }
}

// In place R with R'R = the symmetric matrix in r; false when it is not numerically positive
// definite. packed: kFactorRows * padded_length(n).
inline bool cholesky(double* r, int64_t ld, int64_t n, double* packed) {
  for (int64_t k = 0; k < n; k += kFactorRows) {
    const int64_t rows = n - k < kFactorRows ? n - k : kFactorRows, next = k + rows;
    if (!factor_diagonal(r + k * ld + k, ld, rows)) return false;
    if (next == n) break;
    double* right = r + k * ld + next;
    solve_panel(r + k * ld + k, right, ld, rows, n - next);
    pack_strips(right, ld, rows, n - next, packed);
    rank_update<-1>(packed, rows, n - next, r + next * ld + next, ld);
  }
  return true;
}

// x := R^-T x for two vectors; four rows share each pass over x.
inline void solve_transposed(const double* r, int64_t ld, int64_t n, double* x0, double* x1) {
  for (int64_t k = 0; k < n; k += 4) {
    const int64_t rows = n - k < 4 ? n - k : 4;
    for (int64_t i = k; i < k + rows; ++i) {
      const double* row = r + i * ld;
      x0[i] /= row[i];
      x1[i] /= row[i];
      for (int64_t j = i + 1; j < k + rows; ++j) {
        x0[j] -= row[j] * x0[i];
        x1[j] -= row[j] * x1[i];
      }
    }
    const double* row = r + k * ld;
    VecD a[4], b[4];
    for (int64_t q = 0; q < rows; ++q) a[q] = broadcast(x0[k + q]), b[q] = broadcast(x1[k + q]);
    for (int64_t j = k + 4; j < n; j += kWidth) {
      VecD sum0 = load(x0 + j), sum1 = load(x1 + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < 4; ++q) {
        const VecD element = load(row + q * ld + j);
        sum0 -= a[q] * element;
        sum1 -= b[q] * element;
      }
      store(x0 + j, sum0);
      store(x1 + j, sum1);
    }
  }
}

// x := R^-1 x for two vectors.
inline void solve_upper(const double* r, int64_t ld, int64_t n, double* x0, double* x1) {
  for (int64_t k = (n - 1) / 4 * 4; k >= 0; k -= 4) {
    const int64_t rows = n - k < 4 ? n - k : 4;
    const double* row = r + k * ld;
    VecD sum0[4] = {}, sum1[4] = {};
    for (int64_t j = k + 4; j < n; j += kWidth) {
      const VecD a = load(x0 + j), b = load(x1 + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < 4; ++q) {
        const VecD element = load(row + q * ld + j);
        sum0[q] += element * a;
        sum1[q] += element * b;
      }
    }
    for (int64_t q = rows - 1; q >= 0; --q) {
      double value0 = x0[k + q] - sum_lanes<double>(sum0[q]);
      double value1 = x1[k + q] - sum_lanes<double>(sum1[q]);
      for (int64_t j = k + q + 1; j < k + rows; ++j) {
        value0 -= row[q * ld + j] * x0[j];
        value1 -= row[q * ld + j] * x1[j];
      }
      x0[k + q] = value0 / row[q * ld + k + q];
      x1[k + q] = value1 / row[q * ld + k + q];
    }
  }
}

// y := G x for two vectors; each element of the upper triangle is read once.
inline void symmetric_multiply(const double* g, int64_t ld, int64_t n, const double* x0,
                               const double* x1, double* y0, double* y1) {
  std::memset(y0, 0, static_cast<size_t>(ld) * sizeof(double));
  std::memset(y1, 0, static_cast<size_t>(ld) * sizeof(double));
  for (int64_t k = 0; k < n; k += 4) {
    const int64_t rows = n - k < 4 ? n - k : 4;
    const double* row = g + k * ld;
    VecD a[4] = {}, b[4] = {}, sum0[4] = {}, sum1[4] = {};
    for (int64_t q = 0; q < rows; ++q) a[q] = broadcast(x0[k + q]), b[q] = broadcast(x1[k + q]);
    for (int64_t j = k + 4; j < n; j += kWidth) {
      const VecD u0 = load(x0 + j), u1 = load(x1 + j);
      VecD v0 = load(y0 + j), v1 = load(y1 + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < 4; ++q) {
        const VecD element = load(row + q * ld + j);
        sum0[q] += element * u0;
        sum1[q] += element * u1;
        v0 += element * a[q];
        v1 += element * b[q];
      }
      store(y0 + j, v0);
      store(y1 + j, v1);
    }
    for (int64_t q = 0; q < rows; ++q) {
      y0[k + q] += sum_lanes<double>(sum0[q]);
      y1[k + q] += sum_lanes<double>(sum1[q]);
      for (int64_t p = 0; p < rows; ++p) {
        const double element = p < q ? row[p * ld + k + q] : row[q * ld + k + p];
        y0[k + q] += element * x0[k + p];
        y1[k + q] += element * x1[k + p];
      }
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
