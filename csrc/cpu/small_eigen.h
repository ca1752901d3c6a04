// Eigenvalues and eigenvectors of one small dense symmetric matrix: Householder tridiagonalisation
// and implicit QL with Wilkinson's shift (Golub & Van Loan, Matrix Computations, 8.3). For the
// projected matrices of the Krylov spaces, at most a few dozen rows.
#pragma once

#include <cmath>
#include <cstdint>

namespace tscnc::TSCNC_ISA {

// Reduces a (k x k, row-major, destroyed) to diagonal d and subdiagonal e; rows of q become the
// transposed orthogonal factor, so that q a q' is tridiagonal. v: 2 k scratch.
inline void tridiagonalise(int64_t k, double* a, double* d, double* e, double* q, double* v) {
  double* p = v + k;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) q[i * k + j] = i == j;
  }
  for (int64_t c = 0; c + 2 < k; ++c) {
    double squares = 0;
    for (int64_t i = c + 2; i < k; ++i) squares += a[i * k + c] * a[i * k + c];
    const double head = a[(c + 1) * k + c];
    if (squares == 0) continue;
    const double norm = std::sqrt(head * head + squares), alpha = head > 0 ? -norm : norm;
    for (int64_t i = 0; i < k; ++i) v[i] = i <= c ? 0 : a[i * k + c];
    v[c + 1] -= alpha;
    const double beta = 2 / (v[c + 1] * v[c + 1] + squares);
    // By rows, which the compiler vectorises: p = beta A v, then A -= v p' + p v' with p made
    // orthogonal.
    for (int64_t j = c; j < k; ++j) p[j] = 0;
    for (int64_t i = c + 1; i < k; ++i) {
      const double scale = beta * v[i];
      for (int64_t j = c; j < k; ++j) p[j] += scale * a[i * k + j];
    }
    double inner = 0;
    for (int64_t i = c; i < k; ++i) inner += p[i] * v[i];
    for (int64_t i = c; i < k; ++i) p[i] -= beta / 2 * inner * v[i];
    for (int64_t i = c; i < k; ++i) {
      const double x = v[i], y = p[i];
      for (int64_t j = c; j < k; ++j) a[i * k + j] -= x * p[j] + y * v[j];
    }
    for (int64_t j = 0; j < k; ++j) p[j] = 0;
    for (int64_t i = c + 1; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) p[j] += v[i] * q[i * k + j];
    }
    for (int64_t i = c + 1; i < k; ++i) {
      const double scale = beta * v[i];
      for (int64_t j = 0; j < k; ++j) q[i * k + j] -= scale * p[j];
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    d[i] = a[i * k + i];
    e[i] = i + 1 < k ? a[(i + 1) * k + i] : 0;
  }
}

// One implicit QL step on rows low..high of the tridiagonal matrix, the rotations applied to the
// rows of q.
inline void ql_step(int64_t k, int64_t low, int64_t high, double* d, double* e, double* q) {
  double g = (d[low + 1] - d[low]) / (2 * e[low]);
  double r = std::sqrt(g * g + 1);
  g = d[high] - d[low] + e[low] / (g + (g >= 0 ? r : -r));
  double sine = 1, cosine = 1, shift = 0;
  for (int64_t i = high - 1; i >= low; --i) {
    const double f = sine * e[i], b = cosine * e[i];
    r = std::sqrt(f * f + g * g);
    e[i + 1] = r;
    if (r == 0) {
      d[i + 1] -= shift;
      e[high] = 0;
      return;
    }
    sine = f / r;
    cosine = g / r;
    g = d[i + 1] - shift;
    r = (d[i] - g) * sine + 2 * cosine * b;
    shift = sine * r;
    d[i + 1] = g + shift;
    g = cosine * r - b;
    double *upper = q + (i + 1) * k, *lower = q + i * k;
    for (int64_t j = 0; j < k; ++j) {
      const double old = upper[j];
      upper[j] = sine * lower[j] + cosine * old;
      lower[j] = cosine * lower[j] - sine * old;
    }
  }
  d[low] -= shift;
  e[low] = g;
  e[high] = 0;
}

// Eigenvalues in descending order and the eigenvectors as the rows of q. a is destroyed; work: 3 k.
inline void small_eigen(int64_t k, double* a, double* values, double* q, double* work) {
  double* e = work;
  tridiagonalise(k, a, values, e, q, work + k);
  for (int64_t low = 0; low < k; ++low) {
    for (int step = 0; step < 60; ++step) {
      int64_t high = low;
      while (high + 1 < k) {
        const double size = std::fabs(values[high]) + std::fabs(values[high + 1]);
        if (std::fabs(e[high]) <= 0x1p-53 * size) break;
        ++high;
      }
      if (high == low) break;
      ql_step(k, low, high, values, e, q);
    }
  }
  for (int64_t i = 0; i + 1 < k; ++i) {
    int64_t best = i;
    for (int64_t j = i + 1; j < k; ++j) {
      if (values[j] > values[best]) best = j;
    }
    if (best == i) continue;
    const double value = values[i];
    values[i] = values[best];
    values[best] = value;
    for (int64_t j = 0; j < k; ++j) {
      const double old = q[i * k + j];
      q[i * k + j] = q[best * k + j];
      q[best * k + j] = old;
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
