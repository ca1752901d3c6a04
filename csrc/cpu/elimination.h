// Gaussian elimination of a square matrix in fp32 with row pivoting, L U = P A, by recursive
// halving of the columns (Toledo 1997), and the triangular solves with its factors.
//
// An n x n matrix is stored row by row with leading dimension eliminated_ld(n), continued by rows
// of the identity up to eliminated_side(n) and by zero columns. L has a diagonal of ones, not
// stored, and fills what lies below that of U.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "vec.h"

namespace tscnc::TSCNC_ISA {

// Columns eliminated one by one before the rest is updated.
constexpr int64_t kNarrow = 8;
// Rows and columns of a tile of the update, and how many products it sums before it stores.
constexpr int64_t kProductRows = 4, kProductCols = 3 * kLanes<float>, kProductDepth = 256;

inline int64_t eliminated_side(int64_t n) { return (n + kNarrow - 1) / kNarrow * kNarrow; }
// An odd number of cache lines, with room for a tile behind the last column.
inline int64_t eliminated_ld(int64_t n) { return ((n + 48 + 15) / 16 | 1) * 16; }
inline int64_t eliminated_size(int64_t n) { return (eliminated_side(n) + 1) * eliminated_ld(n); }
inline int64_t elimination_scratch(int64_t n) {
  return kProductDepth * kProductCols + kNarrow * eliminated_ld(n);
}

class Elimination {
 public:
  // a: eliminated_size(n) as above, scratch: elimination_scratch(n).
  Elimination(float* a, int64_t n, float* scratch)
      : a_(a),
        packed_(scratch),
        columns_(scratch + kProductDepth * kProductCols),
        side_(eliminated_side(n)),
        ld_(eliminated_ld(n)) {}

  // False where a column holds no usable pivot. Leaves the inverse of U's diagonal in its place.
  bool run() {
    if (!factor(0, side_)) return false;
    for (int64_t i = 0; i < side_; ++i) *at(i, i) = 1 / *at(i, i);
    return true;
  }

  // x := (A'A)^-1 x for two vectors of ld elements, zero behind the n-th; y0, y1: as many. The
  // pivoting's order drops out.
  void apply_inverse_gram(float* x0, float* x1, float* y0, float* y1) const {
    solve_upper_transposed(x0, x1);
    solve_lower_transposed(x0, x1);
    solve_lower(x0, x1, y0, y1);
    solve_upper(y0, y1, x0, x1);
  }

 private:
  using Four __attribute__((vector_size(4 * sizeof(float)))) = float;

  float* at(int64_t row, int64_t col) { return a_ + row * ld_ + col; }
  const float* at(int64_t row, int64_t col) const { return a_ + row * ld_ + col; }
  static int64_t half_of(int64_t width) { return (width / 2 + kNarrow - 1) / kNarrow * kNarrow; }

  // Columns [first, first + width) of the rows from `first` on; swaps whole rows.
  bool factor(int64_t first, int64_t width) {
    if (width == kNarrow) return factor_narrow(first);
    const int64_t left = half_of(width), next = first + left;
    if (!factor(first, left)) return false;
    solve_rows(first, left, next, width - left);
    subtract_product(next, side_ - next, first, left, next, width - left);
    return factor(next, width - left);
  }

  // In a copy of the columns side by side, where whole vectors of rows are eliminated at once.
  bool factor_narrow(int64_t first) {
    const int64_t rows = side_ - first;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < kNarrow; ++c) columns_[c * ld_ + i] = *at(first + i, first + c);
    }
    int64_t pivots[kNarrow];
    for (int64_t j = 0; j < kNarrow; ++j) {
      pivots[j] = find_pivot(j, rows);
      if (pivots[j] < 0) return false;
      for (int64_t c = 0; c < kNarrow; ++c) {
        float* column = columns_ + c * ld_;
        const float kept = column[j];
        column[j] = column[pivots[j]];
        column[pivots[j]] = kept;
      }
      eliminate(j, rows);
    }
    for (int64_t j = 0; j < kNarrow; ++j) {
      if (pivots[j] != j) swap_rows(first + j, first + pivots[j]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < kNarrow; ++c) *at(first + i, first + c) = columns_[c * ld_ + i];
    }
    return true;
  }

  // The first of the rows from j on with the largest entry in the j-th narrow column, or -1.
  int64_t find_pivot(int64_t j, int64_t rows) const {
    const float* column = columns_ + j * ld_;
    float tops[kLanes<float>];
    Vec<float> top = {};
    int64_t i = j;
    for (; i + kLanes<float> <= rows; i += kLanes<float>) {
      const Vec<float> size = abs(load(column + i));
      top = size > top ? size : top;
    }
    store(tops, top);
    float largest = 0;
    for (const float size : tops) largest = size > largest ? size : largest;
    for (; i < rows; ++i) {
      const float size = std::fabs(column[i]);
      largest = size > largest ? size : largest;
    }
    for (i = j; largest > 0 && i < rows; ++i) {
      if (std::fabs(column[i]) == largest) return i;
    }
    return -1;
  }

  // The j-th narrow column from the rows below. What lies behind the last row is scratch.
  void eliminate(int64_t j, int64_t rows) {
    float* left = columns_ + j * ld_;
    const Vec<float> inverse = broadcast(1 / left[j]);
    Vec<float> upper[kNarrow];
    for (int64_t c = j + 1; c < kNarrow; ++c) upper[c] = broadcast(columns_[c * ld_ + j]);
    for (int64_t i = j + 1; i < rows; i += kLanes<float>) {
      const Vec<float> factor = load(left + i) * inverse;
      store(left + i, factor);
      for (int64_t c = j + 1; c < kNarrow; ++c) {
        float* column = columns_ + c * ld_;
        store(column + i, load(column + i) - factor * upper[c]);
      }
    }
  }

  void swap_rows(int64_t i, int64_t k) {
    float *x = at(i, 0), *y = at(k, 0);
    for (int64_t j = 0; j < ld_; j += kLanes<float>) {
      const Vec<float> kept = load(x + j);
      store(x + j, load(y + j));
      store(y + j, kept);
    }
  }

  // Rows [first, first + size) of U in the given columns: L^-1 times what is there.
  void solve_rows(int64_t first, int64_t size, int64_t col, int64_t cols) {
    if (size > kNarrow) {
      const int64_t above = half_of(size), next = first + above;
      solve_rows(first, above, col, cols);
      subtract_product(next, size - above, first, above, col, cols);
      return solve_rows(next, size - above, col, cols);
    }
    // Whole vectors reach into columns that are still to come, or padding: left as they are.
    const int64_t whole = cols / kLanes<float> * kLanes<float>;
    for (int64_t j = 0; j < whole; j += kLanes<float>) {
      Vec<float> rows[kNarrow];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kNarrow; ++i) {
        rows[i] = load(at(first + i, col + j));
        for (int64_t p = 0; p < i; ++p) rows[i] -= broadcast(*at(first + i, first + p)) * rows[p];
        store(at(first + i, col + j), rows[i]);
      }
    }
    for (int64_t i = 0; i < kNarrow; ++i) {
      for (int64_t p = 0; p < i; ++p) {
        const float factor = *at(first + i, first + p);
        for (int64_t j = whole; j < cols; ++j) {
          *at(first + i, col + j) -= factor * *at(first + p, col + j);
        }
      }
    }
  }

  // A[rows, cols] -= A[rows, inner] A[inner, cols], ranges given as first and count.
  void subtract_product(int64_t row, int64_t rows, int64_t inner, int64_t depth, int64_t col,
                        int64_t cols) {
    for (int64_t k = 0; k < depth; k += kProductDepth) {
      const int64_t step = depth - k < kProductDepth ? depth - k : kProductDepth;
      for (int64_t j = 0; j < cols; j += kProductCols) {
        const int64_t width = cols - j < kProductCols ? cols - j : kProductCols;
        pack(inner + k, step, col + j, width);
        const int64_t vectors = (width + kLanes<float> - 1) / kLanes<float>;
        for (int64_t i = row; i < row + rows; i += kProductRows) {
          const float* left = at(i, inner + k);
          float* target = at(i, col + j);
          if (vectors == 3) subtract_tile<3>(left, step, target);
          if (vectors == 2) subtract_tile<2>(left, step, target);
          if (vectors == 1) subtract_tile<1>(left, step, target);
        }
      }
    }
  }

  // Zeros behind `width`: what a tile covers beyond it stays as it is.
  void pack(int64_t row, int64_t depth, int64_t col, int64_t width) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* source = at(row + k, col);
      float* target = packed_ + k * kProductCols;
      for (int64_t c = 0; c < width; ++c) target[c] = source[c];
      for (int64_t c = width; c < kProductCols; ++c) target[c] = 0;
    }
  }

  template <int V>
  void subtract_tile(const float* left, int64_t depth, float* target) const {
    Vec<float> sums[kProductRows][V];
    for (int64_t r = 0; r < kProductRows; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = load(target + r * ld_ + v * kLanes<float>);
    }
    for (int64_t k = 0; k < depth; ++k) {
      const float* source = packed_ + k * kProductCols;
      Vec<float> right[V];
      for (int v = 0; v < V; ++v) right[v] = load(source + v * kLanes<float>);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kProductRows; ++r) {
        const Vec<float> factor = broadcast(left[r * ld_ + k]);
        for (int v = 0; v < V; ++v) sums[r][v] -= factor * right[v];
      }
    }
    for (int64_t r = 0; r < kProductRows; ++r) {
      for (int v = 0; v < V; ++v) store(target + r * ld_ + v * kLanes<float>, sums[r][v]);
    }
  }

  static Four fold(Vec<float> value) {
    Four parts[kLanes<float> / 4];
    std::memcpy(parts, &value, sizeof(value));
    Four sum = parts[0];
    for (int64_t p = 1; p < kLanes<float> / 4; ++p) sum += parts[p];
    return sum;
  }

  // The sums of the lanes of four vectors.
  static Four sum_each(const Vec<float>* values) {
    using Places __attribute__((vector_size(4 * sizeof(int32_t)))) = int32_t;
    const Four a = fold(values[0]), b = fold(values[1]), c = fold(values[2]), d = fold(values[3]);
    const Four ab =
        __builtin_shuffle(a, b, Places{0, 4, 1, 5}) + __builtin_shuffle(a, b, Places{2, 6, 3, 7});
    const Four cd =
        __builtin_shuffle(c, d, Places{0, 4, 1, 5}) + __builtin_shuffle(c, d, Places{2, 6, 3, 7});
    return __builtin_shuffle(ab, cd, Places{0, 1, 4, 5}) +
           __builtin_shuffle(ab, cd, Places{2, 3, 6, 7});
  }

  // rest[v][q] := x_v[k + q] less the products of row k + q with the columns [first, last) of y_v.
  void subtract_known(int64_t k, int64_t first, int64_t last, const float* x0, const float* x1,
                      const float* y0, const float* y1, float rest[2][4]) const {
    const float* row = at(k, 0);
    Vec<float> sum0[4] = {}, sum1[4] = {};
    for (int64_t j = first; j < last; j += kLanes<float>) {
      const Vec<float> a = load(y0 + j), b = load(y1 + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < 4; ++q) {
        const Vec<float> element = load(row + q * ld_ + j);
        sum0[q] += element * a;
        sum1[q] += element * b;
      }
    }
    Four given0, given1;
    std::memcpy(&given0, x0 + k, sizeof(given0));
    std::memcpy(&given1, x1 + k, sizeof(given1));
    given0 -= sum_each(sum0);
    given1 -= sum_each(sum1);
    std::memcpy(rest[0], &given0, sizeof(given0));
    std::memcpy(rest[1], &given1, sizeof(given1));
  }

  // Rows k to k + 3, times x there, off the columns [first, last) of x.
  void subtract_rows(int64_t k, int64_t first, int64_t last, float* x0, float* x1) const {
    const float* row = at(k, 0);
    Vec<float> a[4], b[4];
    for (int64_t q = 0; q < 4; ++q) a[q] = broadcast(x0[k + q]), b[q] = broadcast(x1[k + q]);
    for (int64_t j = first; j < last; j += kLanes<float>) {
      Vec<float> sum0 = load(x0 + j), sum1 = load(x1 + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < 4; ++q) {
        const Vec<float> element = load(row + q * ld_ + j);
        sum0 -= a[q] * element;
        sum1 -= b[q] * element;
      }
      store(x0 + j, sum0);
      store(x1 + j, sum1);
    }
  }

  // y := L^-1 x. y is zero where it is not known yet, so that whole vectors add nothing there.
  void solve_lower(const float* x0, const float* x1, float* y0, float* y1) const {
    std::memset(y0, 0, static_cast<size_t>(ld_) * sizeof(float));
    std::memset(y1, 0, static_cast<size_t>(ld_) * sizeof(float));
    float* y[2] = {y0, y1};
    for (int64_t k = 0; k < side_; k += 4) {
      float rest[2][4];
      subtract_known(k, 0, k, x0, x1, y0, y1, rest);
      const float* row = at(k, k);
      for (int v = 0; v < 2; ++v) {
        for (int64_t q = 0; q < 4; ++q) {
          y[v][k + q] = rest[v][q];
          for (int64_t p = q + 1; p < 4; ++p) rest[v][p] -= row[p * ld_ + q] * rest[v][q];
        }
      }
    }
  }

  // y := U^-1 x.
  void solve_upper(const float* x0, const float* x1, float* y0, float* y1) const {
    std::memset(y0, 0, static_cast<size_t>(ld_) * sizeof(float));
    std::memset(y1, 0, static_cast<size_t>(ld_) * sizeof(float));
    float* y[2] = {y0, y1};
    for (int64_t k = side_ - 4; k >= 0; k -= 4) {
      float rest[2][4];
      subtract_known(k, k + 4, side_, x0, x1, y0, y1, rest);
      const float* row = at(k, k);
      for (int v = 0; v < 2; ++v) {
        for (int64_t q = 3; q >= 0; --q) {
          const float value = y[v][k + q] = rest[v][q] * row[q * ld_ + q];
          for (int64_t p = 0; p < q; ++p) rest[v][p] -= row[p * ld_ + q] * value;
        }
      }
    }
  }

  // x := U^-T x.
  void solve_upper_transposed(float* x0, float* x1) const {
    for (int64_t k = 0; k < side_; k += 4) {
      const float* row = at(k, k);
      for (float* x : {x0 + k, x1 + k}) {
        for (int64_t q = 0; q < 4; ++q) {
          x[q] *= row[q * ld_ + q];
          for (int64_t p = q + 1; p < 4; ++p) x[p] -= row[q * ld_ + p] * x[q];
        }
      }
      subtract_rows(k, k + 4, side_, x0, x1);
    }
  }

  // x := L^-T x. Whole vectors also run over what is solved already, which is then put back.
  void solve_lower_transposed(float* x0, float* x1) const {
    for (int64_t k = side_ - 4; k >= 0; k -= 4) {
      const float* row = at(k, k);
      for (float* x : {x0 + k, x1 + k}) {
        for (int64_t q = 3; q > 0; --q) {
          for (int64_t p = 0; p < q; ++p) x[p] -= row[q * ld_ + p] * x[q];
        }
      }
      const Vec<float> solved0 = load(x0 + k), solved1 = load(x1 + k);
      subtract_rows(k, 0, k, x0, x1);
      store(x0 + k, solved0);
      store(x1 + k, solved1);
    }
  }

  float *a_, *packed_, *columns_;
  int64_t side_, ld_;
};

}  // namespace tscnc::TSCNC_ISA
