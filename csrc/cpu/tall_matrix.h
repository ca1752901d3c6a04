// A matrix seen tall, m >= n, whatever way it is stored: wide storage is read transposed, masked
// entries are zero, removed rows and columns are skipped, and everything is fp64 from here on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dense_symmetric.h"
#include "extreme_singular_values.h"

namespace tscnc::TSCNC_ISA {

// Compressed rows of the tall matrix, built when the pattern is sparse enough for rank-1 updates to
// win.
struct SparseRows {
  int64_t* begin;   // m + 1
  int32_t* column;  // nnz
  double* value;    // nnz
};

struct TallMatrix {
  const SpectralMatrix* source;
  bool transposed;  // the small side is the stored rows
  int64_t m, n;
  const int64_t *long_kept, *short_kept;
  double scale;  // a power of two that keeps squares of fp64 entries in range
  bool sparse;
  SparseRows rows;
};

inline double to_double(double value) { return value; }
inline double to_double(float value) { return value; }
inline double to_double(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
// As the vector load of vec.h: shift into place, rebias by a multiplication.
inline double to_double(fp16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  result *= 0x1p112f;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    std::memcpy(&result, &bits, sizeof(result));
  }
  return value.bits & 0x8000u ? -result : result;
}

template <class Function>
inline void dispatch_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float64:
      return function(static_cast<double*>(nullptr));
    case DType::float32:
      return function(static_cast<float*>(nullptr));
    case DType::bfloat16:
      return function(static_cast<bf16*>(nullptr));
    case DType::float16:
      return function(static_cast<fp16*>(nullptr));
  }
}

inline int64_t kept(const int64_t* list, int64_t i) { return list == nullptr ? i : list[i]; }

template <class T>
inline double entry(const SpectralMatrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.cols + col;
  if (a.mask != nullptr && !a.mask[at]) return 0;
  return to_double(static_cast<const T*>(a.data)[at]);
}

template <class T>
inline void load_dense_rows(const TallMatrix& a, int64_t first, int64_t count, double* panel,
                            int64_t ld) {
  const SpectralMatrix& source = *a.source;
  if (a.transposed) {
    for (int64_t j = 0; j < a.n; ++j) {
      const int64_t row = kept(a.short_kept, j);
      for (int64_t k = 0; k < count; ++k) {
        panel[k * ld + j] = a.scale * entry<T>(source, row, kept(a.long_kept, first + k));
      }
    }
  } else if (source.mask == nullptr && a.short_kept == nullptr && a.long_kept == nullptr) {
    const T* data = static_cast<const T*>(source.data) + first * a.n;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < a.n; ++j) panel[k * ld + j] = a.scale * to_double(data[k * a.n + j]);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = kept(a.long_kept, first + k);
      for (int64_t j = 0; j < a.n; ++j) {
        panel[k * ld + j] = a.scale * entry<T>(source, row, kept(a.short_kept, j));
      }
    }
  }
}

// Rows [first, first + count) as a dense row-major panel with zero padding.
inline void load_rows(const TallMatrix& a, int64_t first, int64_t count, double* panel,
                      int64_t ld) {
  std::memset(panel, 0, static_cast<size_t>(count * ld) * sizeof(double));
  if (a.sparse) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = first + k;
      for (int64_t e = a.rows.begin[row]; e < a.rows.begin[row + 1]; ++e) {
        panel[k * ld + a.rows.column[e]] = a.rows.value[e];
      }
    }
    return;
  }
  dispatch_dtype(a.source->dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    load_dense_rows<T>(a, first, count, panel, ld);
  });
}

// Calls visit(row, col) for the kept positions of the mask in row-major order.
template <class Visit>
inline void for_each_kept(const SpectralMatrix& a, const Visit& visit) {
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.row_begin != nullptr) {
      for (int64_t e = a.row_begin[row]; e < a.row_begin[row + 1]; ++e) {
        visit(row, static_cast<int64_t>(a.entry_column[e]));
      }
      continue;
    }
    const bool* mask = a.mask + row * a.cols;
    int64_t col = 0;
    for (; col + 8 <= a.cols; col += 8) {
      uint64_t word;
      std::memcpy(&word, mask + col, sizeof(word));
      for (; word != 0; word &= word - 1) visit(row, col + __builtin_ctzll(word) / 8);
    }
    for (; col < a.cols; ++col) {
      if (mask[col]) visit(row, col);
    }
  }
}

// position: rows + cols scratch, the place of every stored row or column among the kept ones.
template <class T>
inline void build_sparse_rows(TallMatrix* a, int32_t* position) {
  const SpectralMatrix& source = *a->source;
  int32_t *row_position = position, *col_position = position + source.rows;
  for (int64_t i = 0; i < source.rows + source.cols; ++i) position[i] = -1;
  for (int64_t i = 0; i < source.kept_row_count; ++i) {
    row_position[kept(source.kept_rows, i)] = static_cast<int32_t>(i);
  }
  for (int64_t j = 0; j < source.kept_col_count; ++j) {
    col_position[kept(source.kept_cols, j)] = static_cast<int32_t>(j);
  }
  const int32_t* long_position = a->transposed ? col_position : row_position;
  const int32_t* short_position = a->transposed ? row_position : col_position;
  SparseRows& rows = a->rows;
  for (int64_t i = 0; i <= a->m; ++i) rows.begin[i] = 0;
  for_each_kept(source, [&](int64_t row, int64_t col) {
    const int32_t at = long_position[a->transposed ? col : row];
    if (at >= 0 && short_position[a->transposed ? row : col] >= 0) ++rows.begin[at + 1];
  });
  for (int64_t i = 0; i < a->m; ++i) rows.begin[i + 1] += rows.begin[i];
  // Filling moves every begin to its row's end, which is the next row's begin: shift back
  // afterwards.
  for_each_kept(source, [&](int64_t row, int64_t col) {
    const int32_t at = long_position[a->transposed ? col : row];
    const int32_t column = short_position[a->transposed ? row : col];
    if (at < 0 || column < 0) return;
    const int64_t e = rows.begin[at]++;
    rows.column[e] = column;
    rows.value[e] =
        a->scale * to_double(static_cast<const T*>(source.data)[row * source.cols + col]);
  });
  for (int64_t i = a->m; i > 0; --i) rows.begin[i] = rows.begin[i - 1];
  rows.begin[0] = 0;
}

// sum[q][r] := row_r x_q and z_q += sum over r of sum[q][r] row_r, for four rows and four vectors.
inline void multiply_rows(const double* row, const double* x, double* z, int64_t ld, int64_t n,
                          double sum[4][4]) {
  VecD inner[4][4] = {};
  for (int64_t j = 0; j < n; j += kWidth) {
    const VecD r0 = load(row + j), r1 = load(row + ld + j);
    const VecD r2 = load(row + 2 * ld + j), r3 = load(row + 3 * ld + j);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const VecD element = load(x + q * ld + j);
      inner[q][0] += r0 * element;
      inner[q][1] += r1 * element;
      inner[q][2] += r2 * element;
      inner[q][3] += r3 * element;
    }
  }
  for (int q = 0; q < 4; ++q) {
    for (int r = 0; r < 4; ++r) sum[q][r] = sum_lanes<double>(inner[q][r]);
  }
  for (int64_t j = 0; j < n; j += kWidth) {
    const VecD r0 = load(row + j), r1 = load(row + ld + j);
    const VecD r2 = load(row + 2 * ld + j), r3 = load(row + 3 * ld + j);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const VecD part = sum[q][0] * r0 + sum[q][1] * r1 + (sum[q][2] * r2 + sum[q][3] * r3);
      store(z + q * ld + j, load(z + q * ld + j) + part);
    }
  }
}

// Rows [first, first + count) of a wide stored matrix seen tall, as columns: panel[j * kColumns +
// k] is entry j of row first + k, zero behind the last of them.
constexpr int64_t kColumns = 64;

template <class T>
inline void load_columns(const TallMatrix& a, int64_t first, int64_t count, double* panel) {
  const SpectralMatrix& source = *a.source;
  const bool whole = source.mask == nullptr && a.long_kept == nullptr;
  for (int64_t j = 0; j < a.n; ++j, panel += kColumns) {
    const int64_t row = kept(a.short_kept, j);
    const T* data = static_cast<const T*>(source.data) + row * source.cols + first;
    if (whole && count == kColumns) {
      for (int64_t k = 0; k < kColumns; ++k) panel[k] = a.scale * to_double(data[k]);
      continue;
    }
    for (int64_t k = 0; k < count; ++k) {
      panel[k] = a.scale * entry<T>(source, row, kept(a.long_kept, first + k));
    }
    for (int64_t k = count; k < kColumns; ++k) panel[k] = 0;
  }
}

// y_q := A x_q for the rows in the panel and four vectors.
inline void multiply_columns(const double* panel, int64_t n, const double* x, int64_t ld, double* y,
                             int64_t y_stride) {
  for (int64_t k = 0; k < kColumns; k += 2 * kWidth) {
    VecD sum[4][2] = {};
    const double* row = panel + k;
    for (int64_t j = 0; j < n; ++j, row += kColumns) {
      const VecD left = load(row), right = load(row + kWidth);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const VecD weight = broadcast(x[q * ld + j]);
        sum[q][0] += weight * left;
        sum[q][1] += weight * right;
      }
    }
    for (int q = 0; q < 4; ++q) {
      store(y + q * y_stride + k, sum[q][0]);
      store(y + q * y_stride + k + kWidth, sum[q][1]);
    }
  }
}

// z_q += A'y_q for the rows in the panel, kEach columns of A from z on, and two vectors.
template <int kEach>
inline void multiply_columns_back(const double* panel, const double* y, int64_t y_stride, double* z,
                                  int64_t ld) {
  VecD sum[2][kEach] = {};
  for (int64_t k = 0; k < kColumns; k += kWidth) {
    const VecD y0 = load(y + k), y1 = load(y + y_stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < kEach; ++r) {
      const VecD element = load(panel + r * kColumns + k);
      sum[0][r] += element * y0;
      sum[1][r] += element * y1;
    }
  }
  for (int r = 0; r < kEach; ++r) {
    z[r] += sum_lanes<double>(sum[0][r]);
    z[ld + r] += sum_lanes<double>(sum[1][r]);
  }
}

// multiply_both for a wide stored matrix. y is written up to the next multiple of kColumns.
inline void multiply_both_wide(const TallMatrix& a, const double* x, double* y, int64_t y_stride,
                               double* z, int64_t ld, double* panel) {
  for (int64_t first = 0; first < a.m; first += kColumns) {
    const int64_t count = a.m - first < kColumns ? a.m - first : kColumns;
    dispatch_dtype(a.source->dtype, [&](auto* tag) {
      load_columns<std::remove_pointer_t<decltype(tag)>>(a, first, count, panel);
    });
    multiply_columns(panel, a.n, x, ld, y + first, y_stride);
    for (int pair = 0; pair < 4; pair += 2) {
      const double* image = y + pair * y_stride + first;
      int64_t j = 0;
      for (; j + 4 <= a.n; j += 4) {
        multiply_columns_back<4>(panel + j * kColumns, image, y_stride, z + pair * ld + j, ld);
      }
      for (; j < a.n; ++j) {
        multiply_columns_back<1>(panel + j * kColumns, image, y_stride, z + pair * ld + j, ld);
      }
    }
  }
}

// y := A x (4 vectors of stride y_stride, at least m rounded up to kColumns) and z := A'y in one
// pass over A. x, z: 4 rows of length ld. panel: kFactorRows * ld and kColumns * n.
inline void multiply_both(const TallMatrix& a, const double* x, double* y, int64_t y_stride,
                          double* z, int64_t ld, double* panel) {
  std::memset(z, 0, static_cast<size_t>(4 * ld) * sizeof(double));
  if (a.sparse) {
    for (int64_t row = 0; row < a.m; ++row) {
      double sum[4] = {};
      for (int64_t e = a.rows.begin[row]; e < a.rows.begin[row + 1]; ++e) {
        for (int q = 0; q < 4; ++q) sum[q] += a.rows.value[e] * x[q * ld + a.rows.column[e]];
      }
      for (int64_t e = a.rows.begin[row]; e < a.rows.begin[row + 1]; ++e) {
        for (int q = 0; q < 4; ++q) z[q * ld + a.rows.column[e]] += a.rows.value[e] * sum[q];
      }
      for (int q = 0; q < 4; ++q) y[q * y_stride + row] = sum[q];
    }
    return;
  }
  if (a.transposed) return multiply_both_wide(a, x, y, y_stride, z, ld, panel);
  for (int64_t first = 0; first < a.m; first += kFactorRows) {
    const int64_t count = a.m - first < kFactorRows ? a.m - first : kFactorRows;
    load_rows(a, first, count, panel, ld);
    std::memset(panel + count * ld, 0, static_cast<size_t>((-count & 3) * ld) * sizeof(double));
    for (int64_t k = 0; k < count; k += 4) {
      double sum[4][4];
      multiply_rows(panel + k * ld, x, z, ld, a.n, sum);
      for (int64_t r = 0; r < 4 && k + r < count; ++r) {
        for (int q = 0; q < 4; ++q) y[q * y_stride + first + k + r] = sum[q][r];
      }
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
