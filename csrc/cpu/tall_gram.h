// The Gram matrix of a tall matrix: rank-k updates from packed rows, or scattered rank-1 updates
// where it is sparse.
#pragma once

#include "tall_matrix.h"

namespace tscnc::TSCNC_ISA {

// Whether strips can be packed straight from a stored matrix that is the transpose of a.
inline bool packs_transposed(const TallMatrix& a) {
  const SpectralMatrix& source = *a.source;
  const bool whole = source.mask == nullptr && a.short_kept == nullptr && a.long_kept == nullptr;
  return a.transposed && whole &&
         (source.dtype == DType::float32 || source.dtype == DType::float64);
}

// Two rows of g share each pass over a row's entries; the one element below the diagonal that this
// touches is scratch.
template <class T>
inline void sparse_gram(const TallMatrix& a, T* g, int64_t ld) {
  const int32_t* column = a.rows.column;
  const double* value = a.rows.value;
  for (int64_t row = 0; row < a.m; ++row) {
    const int64_t end = a.rows.begin[row + 1];
    for (int64_t e = a.rows.begin[row]; e < end; e += 2) {
      const bool pair = e + 1 < end;
      T *upper = g + column[e] * ld, *lower = pair ? g + column[e + 1] * ld : upper;
      const T first = static_cast<T>(value[e]);
      const T second = pair ? static_cast<T>(value[e + 1]) : 0;
      for (int64_t f = e; f < end; ++f) {
        const T other = static_cast<T>(value[f]);
        upper[column[f]] += first * other;
        lower[column[f]] += second * other;
      }
    }
  }
}

// Adds the rows [first, last) of a dense A to the upper triangle of A'A, the products of up to
// kUpdateDepth rows summed in T. panel: kUpdateDepth<double> * ld, packed: packed_size(n).
template <class T>
inline void add_gram(const TallMatrix& a, int64_t first, int64_t last, double* g, int64_t ld,
                     double* panel, double* packed) {
  const bool direct = packs_transposed(a);
  const int64_t depth = direct ? kUpdateDepth<T> : kUpdateDepth<double>;
  T* strips = reinterpret_cast<T*>(packed);
  for (; first < last; first += depth) {
    const int64_t count = last - first < depth ? last - first : depth;
    if (direct && a.source->dtype == DType::float32) {
      const float* data = static_cast<const float*>(a.source->data);
      pack_transposed(data + first, a.m, count, a.n, static_cast<T>(a.scale), strips);
    } else if (direct) {
      const double* data = static_cast<const double*>(a.source->data);
      pack_transposed(data + first, a.m, count, a.n, static_cast<T>(a.scale), strips);
    } else {
      load_rows(a, first, count, panel, ld);
      pack_strips(panel, ld, count, a.n, strips);
    }
    rank_update<1>(strips, count, a.n, g, ld);
  }
}

// Upper triangle of A'A, as add_gram() sums it, or all of a sparse matrix in T. scratch:
// symmetric_size(n).
template <class T>
inline void gram(const TallMatrix& a, double* g, int64_t ld, double* panel, double* packed,
                 double* scratch) {
  const int64_t size = symmetric_size(a.n);
  if (a.sparse && !std::is_same_v<T, double>) {
    T* sums = reinterpret_cast<T*>(scratch);
    std::memset(sums, 0, static_cast<size_t>(size) * sizeof(T));
    sparse_gram(a, sums, ld);
    for (int64_t i = 0; i < size; ++i) g[i] = static_cast<double>(sums[i]);
    return;
  }
  std::memset(g, 0, static_cast<size_t>(size) * sizeof(double));
  if (a.sparse) return sparse_gram(a, g, ld);
  add_gram<T>(a, 0, a.m, g, ld, panel, packed);
}

}  // namespace tscnc::TSCNC_ISA
