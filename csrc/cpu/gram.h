// fp64 linear algebra on the small side of a weight matrix: product, Cholesky factor, inverse.
//
// A Gram matrix squares the condition number, so everything here is fp64 whatever the weights are.
// All matrices are row-major; buffers come from the caller. Each sum has a fixed order, so the
// result does not depend on the number of threads. Everything is inside the ISA's namespace:
// objects of different ISAs link together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA::linalg {

// kTileRows x 3 accumulators, 3 columns and a broadcast fill the 16 (AVX-512: 32) vector registers.
constexpr int64_t kVector = kLanes<double>;
constexpr int64_t kTileRows = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kTileCols = 3 * kVector;
constexpr int64_t kBlockRows = 64;  // rows packed at once: kBlockRows * kDepth doubles stay in L2
constexpr int64_t kDepth = 192;     // kDepth * kTileCols doubles stay in L1
constexpr int64_t kPanel = 64;      // width of a Cholesky panel

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Element (i, j) of a matrix is data[i * row_stride + j * col_stride]; swapped strides are its
// transpose.
template <class T>
struct View {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;

  View transposed() const { return {data, col_stride, row_stride}; }
  View at(int64_t i, int64_t j) const {
    return {data + i * row_stride + j * col_stride, row_stride, col_stride};
  }
};

// Copies `count` (at most kWidth) rows of `source` as `depth` consecutive groups of kWidth values,
// zero padded.
template <int64_t kWidth, class T>
void pack_strip(View<T> source, int64_t count, int64_t depth, double* packed) {
  if (count < kWidth) std::memset(packed, 0, sizeof(double) * kWidth * depth);
  if (source.row_stride == 1 && count == kWidth) {
    for (int64_t p = 0; p < depth; ++p) {
      for (int64_t i = 0; i < kWidth; ++i) {
        packed[p * kWidth + i] = static_cast<double>(source.data[p * source.col_stride + i]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = source.data + i * source.row_stride;
    for (int64_t p = 0; p < depth; ++p) {
      packed[p * kWidth + i] = static_cast<double>(row[p * source.col_stride]);
    }
  }
}

// c[0:rows, 0:cols] += alpha * a b for one packed strip of each; rows <= kTileRows, cols <=
// kTileCols.
inline void multiply_tile(int64_t depth, const double* a, const double* b, double alpha,
                          int64_t rows, int64_t cols, double* c, int64_t c_stride) {
  Vec<double> sums[kTileRows][3] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const Vec<double> b0 = load(b), b1 = load(b + kVector), b2 = load(b + 2 * kVector);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Vec<double> scale = broadcast(a[i]);
      sums[i][0] += scale * b0;
      sums[i][1] += scale * b1;
      sums[i][2] += scale * b2;
    }
    a += kTileRows;
    b += kTileCols;
  }
  if (rows == kTileRows && cols == kTileCols) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      double* row = c + i * c_stride;
      for (int64_t v = 0; v < 3; ++v) {
        store(row + v * kVector, load(row + v * kVector) + alpha * sums[i][v]);
      }
    }
    return;
  }
  double edge[kTileRows * kTileCols];
  std::memcpy(edge, sums, sizeof(edge));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) c[i * c_stride + j] += alpha * edge[i * kTileCols + j];
  }
}

// Doubles that `multiply_add` needs as workspace.
inline int64_t multiply_workspace(int64_t depth, int64_t cols) {
  return (depth < kDepth ? depth : kDepth) * round_up(cols, kTileCols);
}

// c += alpha * a b, with a (rows x depth) and b (depth x cols). With `lower`, only entries on and
// below the diagonal of c are promised; some above it are overwritten.
template <class A, class B>
void multiply_add(int64_t rows, int64_t cols, int64_t depth, double alpha, View<A> a, View<B> b,
                  double* c, int64_t c_stride, bool lower, double* workspace,
                  ParallelFor parallel) {
  const int64_t strips = (cols + kTileCols - 1) / kTileCols;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t step = depth - begin < kDepth ? depth - begin : kDepth;
    for_each_range(parallel, strips, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t j = s * kTileCols;
        const int64_t width = cols - j < kTileCols ? cols - j : kTileCols;
        pack_strip<kTileCols>(b.at(begin, j).transposed(), width, step, workspace + j * step);
      }
    });
    for_each_range(parallel, blocks, [&](int64_t first, int64_t last) {
      alignas(64) double packed[kBlockRows * kDepth];
      for (int64_t index = first; index < last; ++index) {
        // Blocks from both ends in turn: any contiguous range of a triangle is then about the same
        // work.
        const int64_t block = index % 2 == 0 ? index / 2 : blocks - 1 - index / 2;
        const int64_t top = block * kBlockRows;
        const int64_t bottom = top + kBlockRows < rows ? top + kBlockRows : rows;
        for (int64_t i = top; i < bottom; i += kTileRows) {
          const int64_t height = bottom - i < kTileRows ? bottom - i : kTileRows;
          pack_strip<kTileRows>(a.at(i, begin), height, step, packed + (i - top) * step);
        }
        for (int64_t j = 0; j < cols && !(lower && j >= bottom); j += kTileCols) {
          const int64_t width = cols - j < kTileCols ? cols - j : kTileCols;
          for (int64_t i = top; i < bottom; i += kTileRows) {
            const int64_t height = bottom - i < kTileRows ? bottom - i : kTileRows;
            if (lower && j >= i + height) continue;
            multiply_tile(step, packed + (i - top) * step, workspace + j * step, alpha, height,
                          width, c + i * c_stride + j, c_stride);
          }
        }
      }
    });
  }
}

// gram = aᵀ a (n x n) of a (m x n): the lower triangle; what lies above it is unspecified.
template <class T>
void gram_lower(int64_t m, int64_t n, View<T> a, double* gram, double* workspace,
                ParallelFor parallel) {
  std::memset(gram, 0, sizeof(double) * n * n);
  multiply_add(n, n, m, 1.0, a.transposed(), a, gram, n, true, workspace, parallel);
}

// Factors the diagonal block a (n <= kPanel) in place. Returns the first column whose pivot does
// not exceed its floor (a NaN does not either), or n.
inline int64_t cholesky_block(int64_t n, double* a, int64_t stride, const double* floors) {
  double upper[kPanel * kPanel];  // the transposed factor: its row updates are contiguous
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) upper[j * kPanel + i] = a[i * stride + j];
  }
  for (int64_t k = 0; k < n; ++k) {
    double* row = upper + k * kPanel;
    if (!(row[k] > floors[k])) return k;
    const double scale = 1 / std::sqrt(row[k]);
    for (int64_t j = k; j < n; ++j) row[j] *= scale;
    for (int64_t i = k + 1; i < n; ++i) {
      const double factor = row[i];
      double* target = upper + i * kPanel;
      for (int64_t j = i; j < n; ++j) target[j] -= factor * row[j];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) a[i * stride + j] = upper[j * kPanel + i];
  }
  return n;
}

// Solves x factorᵀ = a in place for `rows` rows a (rows x n), with the lower triangular factor of
// one panel.
inline void solve_panel(int64_t rows, int64_t n, const double* factor, double* a, int64_t stride) {
  constexpr int64_t kGroup = 4 * kVector;  // rows solved together, one per lane
  double columns[kPanel * kGroup];
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t count = rows - first < kGroup ? rows - first : kGroup;
    if (count < kGroup) std::memset(columns, 0, sizeof(columns));
    double* block = a + first * stride;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < n; ++j) columns[j * kGroup + r] = block[r * stride + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      double* target = columns + j * kGroup;
      Vec<double> x0 = load(target), x1 = load(target + kVector);
      Vec<double> x2 = load(target + 2 * kVector), x3 = load(target + 3 * kVector);
      for (int64_t p = 0; p < j; ++p) {
        const Vec<double> scale = broadcast(factor[j * stride + p]);
        const double* known = columns + p * kGroup;
        x0 -= scale * load(known);
        x1 -= scale * load(known + kVector);
        x2 -= scale * load(known + 2 * kVector);
        x3 -= scale * load(known + 3 * kVector);
      }
      const Vec<double> inverse = broadcast(1 / factor[j * stride + j]);
      store(target, x0 * inverse);
      store(target + kVector, x1 * inverse);
      store(target + 2 * kVector, x2 * inverse);
      store(target + 3 * kVector, x3 * inverse);
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < n; ++j) block[r * stride + j] = columns[j * kGroup + r];
    }
  }
}

// Replaces the lower triangle of a (n x n) by its Cholesky factor; what lies above is not read and
// unspecified afterwards. `floors` (n): the pivot of column j must exceed floors[j] (zero: positive
// definite). Returns n, or the column that failed; the matrix is then partly factored. Workspace:
// multiply_workspace(n, n).
inline int64_t cholesky_lower(int64_t n, double* a, const double* floors, double* workspace,
                              ParallelFor parallel) {
  for (int64_t k = 0; k < n; k += kPanel) {
    const int64_t width = n - k < kPanel ? n - k : kPanel;
    double* diagonal = a + k * n + k;
    const int64_t done = cholesky_block(width, diagonal, n, floors + k);
    if (done < width) return k + done;
    const int64_t below = n - k - width;
    double* panel = diagonal + width * n;
    constexpr int64_t kChunk = 4 * kVector;
    for_each_range(parallel, (below + kChunk - 1) / kChunk, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kChunk;
      const int64_t end = last * kChunk < below ? last * kChunk : below;
      solve_panel(end - begin, width, diagonal, panel + begin * n, n);
    });
    const View<double> solved{panel, n, 1};
    multiply_add(below, below, width, -1.0, solved, solved.transposed(), panel + width, n, true,
                 workspace, parallel);
  }
  return n;
}

// inverse = factor⁻¹ for a lower triangular factor (n x n); zero above the diagonal.
inline void invert_lower(int64_t n, const double* factor, double* inverse, double* workspace,
                         ParallelFor parallel) {
  std::memset(inverse, 0, sizeof(double) * n * n);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1;
  for (int64_t k = 0; k < n; k += kPanel) {
    const int64_t width = n - k < kPanel ? n - k : kPanel;
    const int64_t known = k + width;
    const double* diagonal = factor + k * n + k;
    double* rows = inverse + k * n;
    constexpr int64_t kChunk = 128;  // columns solved together stay in L1 with the panel's rows
    for_each_range(parallel, (known + kChunk - 1) / kChunk, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kChunk;
      const int64_t end = last * kChunk < known ? last * kChunk : known;
      for (int64_t i = 0; i < width; ++i) {
        double* target = rows + i * n;
        for (int64_t p = 0; p < i; ++p) {
          const double scale = diagonal[i * n + p];
          const double* source = rows + p * n;
          for (int64_t j = begin; j < end; ++j) target[j] -= scale * source[j];
        }
        const double scale = 1 / diagonal[i * n + i];
        for (int64_t j = begin; j < end; ++j) target[j] *= scale;
      }
    });
    multiply_add(n - known, known, width, -1.0, View<double>{factor + known * n + k, n, 1},
                 View<double>{rows, n, 1}, inverse + known * n, n, false, workspace, parallel);
  }
}

// inverse = (factor factorᵀ)⁻¹, both triangles, from factor⁻¹ as `invert_lower` gives it.
inline void inverse_from_inverted_factor(int64_t n, const double* inverted, double* inverse,
                                         double* workspace, ParallelFor parallel) {
  std::memset(inverse, 0, sizeof(double) * n * n);
  for (int64_t k = 0; k < n;
       k += kPanel) {  // rows k.. of the factor are zero from column k + width on
    const int64_t width = n - k < kPanel ? n - k : kPanel;
    const View<double> rows{inverted + k * n, n, 1};
    multiply_add(k + width, k + width, width, 1.0, rows.transposed(), rows, inverse, n, true,
                 workspace, parallel);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) inverse[j * n + i] = inverse[i * n + j];
  }
}

}  // namespace tscnc::TSCNC_ISA::linalg
