// Triangular factor of a tall matrix by Householder reflections, a block of rows at a time: R'R =
// A'A with the error of an orthogonal factorisation, u |A|, where the Gram matrix loses everything
// below sqrt(u) |A|.
#pragma once

#include "tall_matrix.h"

namespace tscnc::TSCNC_ISA {

constexpr int64_t kReflectedRows = 32;

// Folds `count` rows of `panel` (destroyed) into the triangle r. w: ld.
inline void fold_rows(double* r, int64_t ld, int64_t n, double* panel, int64_t count, double* w) {
  double v[kReflectedRows];
  for (int64_t j = 0; j < n; ++j) {
    double squares = 0;
    for (int64_t k = 0; k < count; ++k) {
      v[k] = panel[k * ld + j];
      squares += v[k] * v[k];
    }
    if (squares == 0) continue;
    double* row = r + j * ld;
    const double head = row[j], norm = std::sqrt(head * head + squares);
    const double diagonal = head > 0 ? -norm : norm;
    const double pivot = head - diagonal;
    const double tau = -pivot / diagonal;
    for (int64_t k = 0; k < count; ++k) v[k] /= pivot;
    row[j] = diagonal;
    for (int64_t k = 0; k < count; ++k) panel[k * ld + j] = 0;
    for (int64_t i = j + 1; i < n; i += kWidth) {
      VecD sum = load(row + i);
      for (int64_t k = 0; k < count; ++k) sum += v[k] * load(panel + k * ld + i);
      sum *= tau;
      store(row + i, load(row + i) - sum);
      store(w + i, sum);
    }
    for (int64_t k = 0; k < count; ++k)
      add_scaled(panel + k * ld + j + 1, -v[k], w + j + 1, n - j - 1);
  }
}

// r := R of A. panel: kReflectedRows * ld, w: ld.
inline void row_qr(const TallMatrix& a, double* r, int64_t ld, double* panel, double* w) {
  std::memset(r, 0, static_cast<size_t>(symmetric_size(a.n)) * sizeof(double));
  for (int64_t first = 0; first < a.m; first += kReflectedRows) {
    const int64_t count = a.m - first < kReflectedRows ? a.m - first : kReflectedRows;
    load_rows(a, first, count, panel, ld);
    fold_rows(r, ld, a.n, panel, count, w);
  }
}

// R'R := R'R + shift^2 I.
inline void fold_identity(double* r, int64_t ld, int64_t n, double shift, double* panel,
                          double* w) {
  for (int64_t first = 0; first < n; first += kReflectedRows) {
    const int64_t count = n - first < kReflectedRows ? n - first : kReflectedRows;
    std::memset(panel, 0, static_cast<size_t>(count * ld) * sizeof(double));
    for (int64_t k = 0; k < count; ++k) panel[k * ld + first + k] = shift;
    fold_rows(r, ld, n, panel, count, w);
  }
}

}  // namespace tscnc::TSCNC_ISA
