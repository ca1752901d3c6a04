// Extreme eigenvalues and definiteness of Hermitian matrices, one matrix per vector lane.
//
// Every lane does the same work, whatever its matrix: no shuffles, no branches on values, and the
// result of a matrix does not depend on its neighbours. A matrix is stored as its lower triangle
// by rows, element (i, j) at i (i + 1) / 2 + j, the imaginary parts of the diagonal ignored.
#pragma once

#include <cstdint>

#include "vec_math.h"

namespace tscnc::TSCNC_ISA {

using Lanes = Vec<double>;

struct Complex {
  Lanes re, im;
};

// The reflection I - scale v v^H that maps a vector to a multiple of its last unit vector.
// `vector` is overwritten with v, `square` receives its squared length; scale is 0 for zeros.
inline Lanes reflect(Complex* vector, int64_t n, Lanes square) {
  const Lanes zero{};
  Complex& last = vector[n - 1];
  const Lanes length = sqrt<double>(square),
              size = sqrt<double>(last.re * last.re + last.im * last.im);
  const Lanes ratio = size > 0 ? length / size : zero;
  last.re = size > 0 ? last.re + ratio * last.re : length;
  last.im = size > 0 ? last.im + ratio * last.im : zero;
  const Lanes half = length * (length + size);
  return half > 0 ? 1 / half : zero;
}

// Row i of A <- A - v w^H - w v^H, and its share of p += A x, row i and column i at once.
inline void update_and_multiply(Complex* __restrict row, int64_t i, const Complex* __restrict v,
                                const Complex* __restrict w, const Complex* __restrict x,
                                Complex* __restrict p) {
  const Complex vi = v[i], wi = w[i], xi = x[i];
  Complex sum = p[i];
  for (int64_t j = 0; j < i; ++j) {
    Lanes re = row[j].re, im = row[j].im;
    const Complex vj = v[j], wj = w[j], xj = x[j];
    re -= vi.re * wj.re;
    re -= vi.im * wj.im;
    re -= wi.re * vj.re;
    re -= wi.im * vj.im;
    im -= vi.im * wj.re;
    im += vi.re * wj.im;
    im -= wi.im * vj.re;
    im += wi.re * vj.im;
    row[j] = {re, im};
    sum.re += re * xj.re;
    sum.re -= im * xj.im;
    sum.im += re * xj.im;
    sum.im += im * xj.re;
    Complex pj = p[j];
    pj.re += re * xi.re;
    pj.re += im * xi.im;
    pj.im += re * xi.im;
    pj.im -= im * xi.re;
    p[j] = pj;
  }
  const Lanes own = row[i].re - 2 * (vi.re * wi.re + vi.im * wi.im);
  row[i].re = own;
  p[i] = {sum.re + own * xi.re, sum.im + own * xi.im};
}

// Householder's reduction from the last row up: the diagonal (n) of the tridiagonal matrix and the
// squared sizes (n - 1) of its other diagonal, which is all that its eigenvalues depend on. The
// rank-2 update of one step is done in the same pass over `a` as the product of the next, since
// that pass is bound by memory. `a` is overwritten; `work` holds 4 n.
inline void tridiagonalize(Complex* a, int64_t n, Complex* work, Lanes* diagonal, Lanes* squares) {
  Complex *v = work, *w = v + n, *next = w + n, *p = next + n;
  const Lanes zero{};
  for (int64_t i = 0; i < n; ++i) v[i] = w[i] = {zero, zero};
  for (int64_t k = n - 1; k >= 1; --k) {
    const Complex* row = a + k * (k + 1) / 2;
    const Complex vk = v[k], wk = w[k];
    Lanes square = zero;
    for (int64_t j = 0; j < k; ++j) {
      const Complex vj = v[j], wj = w[j];
      const Lanes re = row[j].re - (vk.re * wj.re + vk.im * wj.im + wk.re * vj.re + wk.im * vj.im);
      const Lanes im = row[j].im - (vk.im * wj.re - vk.re * wj.im + wk.im * vj.re - wk.re * vj.im);
      square += re * re + im * im;
      next[j] = {re, -im};
    }
    diagonal[k] = row[k].re - 2 * (vk.re * wk.re + vk.im * wk.im);
    squares[k - 1] = square;
    const Lanes scale = reflect(next, k, square);
    for (int64_t i = 0; i < k; ++i) p[i] = {zero, zero};
    for (int64_t i = 0; i < k; ++i) update_and_multiply(a + i * (i + 1) / 2, i, v, w, next, p);
    Lanes inner = zero;
    for (int64_t i = 0; i < k; ++i) {
      p[i] = {p[i].re * scale, p[i].im * scale};
      inner += next[i].re * p[i].re + next[i].im * p[i].im;
    }
    inner *= scale * 0.5;
    for (int64_t i = 0; i < k; ++i) {
      v[i] = next[i];
      w[i] = {p[i].re - inner * v[i].re, p[i].im - inner * v[i].im};
    }
  }
  diagonal[0] = a[0].re - 2 * (v[0].re * w[0].re + v[0].im * w[0].im);
}

// Whether x I - T has only positive leading minors: x is above every eigenvalue of T then. T is at
// most 1 in size; minors that are all of one sign with `sign` = -1 mean the same of T - x I.
inline Lanes least_minor(const Lanes* diagonal, const Lanes* squares, int64_t n, Lanes x,
                         double sign) {
  constexpr int64_t kRescale = 16;
  Lanes minor = sign * (x - diagonal[0]), before = broadcast(1.0), least = minor;
  for (int64_t begin = 1; begin < n; begin += kRescale) {
    const int64_t end = begin + kRescale < n ? begin + kRescale : n;
    for (int64_t i = begin; i < end; ++i) {
      const Lanes next = sign * (x - diagonal[i]) * minor - squares[i - 1] * before;
      before = minor;
      minor = next;
      least = minor < least ? minor : least;
    }
    // Of one factor, and so without a change of sign.
    const Lanes size = abs(minor) + abs(before), scale = size > 0 ? 1 / size : size;
    minor *= scale;
    before *= scale;
  }
  return least;
}

struct Ends {
  Lanes largest, smallest;
};

// Both extreme eigenvalues of a tridiagonal matrix to rounding of its norm, by bisection. The
// matrix is overwritten.
inline Ends extreme_eigenvalues(Lanes* diagonal, Lanes* squares, int64_t n) {
  constexpr int kSteps = 54;
  const Lanes zero{};
  Lanes size = zero, before = zero;
  for (int64_t i = 0; i < n; ++i) {
    const Lanes after = i + 1 < n ? sqrt<double>(squares[i]) : zero;
    const Lanes row = abs(diagonal[i]) + before + after;
    size = row > size ? row : size;
    before = after;
  }
  const Lanes scale = size > 0 ? 1 / size : zero;
  // No extreme diagonal entry lies outside of the eigenvalues.
  Lanes top = diagonal[0] * scale, bottom = top;
  for (int64_t i = 0; i < n; ++i) {
    diagonal[i] *= scale;
    if (i + 1 < n) squares[i] *= scale * scale;
    top = diagonal[i] > top ? diagonal[i] : top;
    bottom = diagonal[i] < bottom ? diagonal[i] : bottom;
  }
  Lanes over = broadcast(1 + 1e-15), under = -over;
  for (int step = 0; step < kSteps; ++step) {
    const Lanes x = 0.5 * (top + over), y = 0.5 * (bottom + under);
    const Lanes above = least_minor(diagonal, squares, n, x, 1.0);
    const Lanes below = least_minor(diagonal, squares, n, y, -1.0);
    over = above > 0 ? x : over;
    top = above > 0 ? top : x;
    under = below > 0 ? y : under;
    bottom = below > 0 ? bottom : y;
  }
  return {over * size, under * size};
}

// a b^H subtracted from a 2 x 2 tile of sums, over two rows of each factor.
inline void subtract_products(const Complex* const* left, const Complex* const* right,
                              int64_t count, Complex (*sums)[2]) {
  Complex tile[2][2] = {{sums[0][0], sums[0][1]}, {sums[1][0], sums[1][1]}};
  for (int64_t k = 0; k < count; ++k) {
    for (int i = 0; i < 2; ++i) {
      const Complex x = left[i][k];
      for (int j = 0; j < 2; ++j) {
        const Complex y = right[j][k];
        tile[i][j].re -= x.re * y.re;
        tile[i][j].re -= x.im * y.im;
        tile[i][j].im -= x.im * y.re;
        tile[i][j].im += x.re * y.im;
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) sums[i][j] = tile[i][j];
  }
}

// The least pivot of the Cholesky factorisation, two columns at a time: positive iff the matrix is
// positive definite. `a` is overwritten with the factor as far as pivots are positive.
inline Lanes least_pivot(Complex* a, int64_t n) {
  const auto row = [a](int64_t i) { return a + i * (i + 1) / 2; };
  Lanes least = a[0].re;
  for (int64_t j = 0; j < n; j += 2) {
    const bool wide = j + 1 < n;
    const Complex* right[2] = {row(j), row(wide ? j + 1 : j)};
    Complex corner{};
    Lanes first{}, second{};
    for (int64_t i = j; i < n; i += 2) {
      const bool tall = i + 1 < n;
      Complex* left[2] = {row(i), row(tall ? i + 1 : i)};
      Complex sums[2][2];
      for (int r = 0; r < 2; ++r) {
        sums[r][0] = left[r][j];
        // Above the diagonal nothing is stored, and nothing is read of the sum.
        sums[r][1] = wide && i + r > j && (r == 0 || tall) ? left[r][j + 1] : Complex{};
      }
      subtract_products(left, right, j, sums);
      if (i == j) {
        const Lanes pivot = sums[0][0].re;
        first = 1 / sqrt<double>(pivot > 0 ? pivot : broadcast(1.0));
        corner = {sums[1][0].re * first, sums[1][0].im * first};
        const Lanes next = sums[1][1].re - corner.re * corner.re - corner.im * corner.im;
        second = 1 / sqrt<double>(next > 0 ? next : broadcast(1.0));
        least = pivot < least ? pivot : least;
        if (wide) {
          least = next < least ? next : least;
          left[1][j] = corner;
        }
        continue;
      }
      for (int r = 0; r < (tall ? 2 : 1); ++r) {
        const Complex x = {sums[r][0].re * first, sums[r][0].im * first};
        left[r][j] = x;
        if (!wide) continue;
        const Complex y = sums[r][1];
        left[r][j + 1] = {(y.re - x.re * corner.re - x.im * corner.im) * second,
                          (y.im - x.im * corner.re + x.re * corner.im) * second};
      }
    }
  }
  return least;
}

}  // namespace tscnc::TSCNC_ISA
