// A'A as an operator on blocks of V vectors, in the stored matrix's coordinates, and what the
// solvers that have nothing else write of their result.
#pragma once

#include "fused_pass.h"
#include "spectral_workspace.h"

namespace tscnc::TSCNC_ISA {

// Below this density the compressed rows are read instead of the dense storage.
constexpr double kEntryDensity = 0.25;

inline int64_t small_side(const SpectralMatrix& a) { return a.rows < a.cols ? a.rows : a.cols; }
inline int64_t long_side(const SpectralMatrix& a) { return a.rows < a.cols ? a.cols : a.rows; }

inline const int64_t* small_kept(const SpectralMatrix& a) {
  return a.rows < a.cols ? a.kept_rows : a.kept_cols;
}
inline int64_t small_kept_count(const SpectralMatrix& a) {
  return a.rows < a.cols ? a.kept_row_count : a.kept_col_count;
}

inline bool reads_entries(const SpectralMatrix& a) {
  return a.row_begin != nullptr && static_cast<double>(a.nnz) < kEntryDensity *
                                                                    static_cast<double>(a.rows) *
                                                                    static_cast<double>(a.cols);
}

// Room for `count` values of type L in a buffer of doubles.
template <class L>
inline L* take_lanes(Pieces* pieces, int64_t count) {
  constexpr int64_t kSize = sizeof(L);
  return reinterpret_cast<L*>(pieces->take((count * kSize + 7) / 8));
}

template <class T, int V>
class PassOperator {
 public:
  using L = Compute<T>;

  PassOperator(const SpectralMatrix& a, Pieces* pieces)
      : n(small_side(a)),
        m(long_side(a)),
        ld(lane_length(n)),
        long_ld(lane_length(m)),
        x_(take_lanes<L>(pieces, V * ld)),
        entries_(reads_entries(a) ? take_lanes<KeptEntry<L>>(pieces, a.nnz) : nullptr),
        pass_(a, entries_, take_lanes<L>(pieces, FusedPass<T, V>::scratch_size(a))) {}

  void load(const SpectralMatrix& a) {
    if (entries_ != nullptr) kept_entries<T>(a, entries_);
  }

  // y := A x and z := A'A x for V rows of x with stride ld; y has stride long_ld, z has stride ld.
  void apply(const double* x, L* y, double* z) const {
    for (int64_t i = 0; i < V * ld; ++i) x_[i] = static_cast<L>(x[i]);
    pass_.run(x_, y, long_ld, z, ld);
  }

  int64_t n, m, ld, long_ld;

 private:
  L* x_;
  KeptEntry<L>* entries_;
  FusedPass<T, V> pass_;
};

// Whether A'A of this norm was formed without leaving the range of the lanes.
template <class L>
inline bool in_range(double squared_norm) {
  constexpr double kFar = sizeof(L) == 4 ? 1e30 : 1e280;
  return squared_norm < kFar && squared_norm > 1 / kFar;
}

inline void clear_result(const SpectralMatrix& a, SpectralResult* out) {
  for (int end = 0; end < 2; ++end) {
    zero(out->left[end], a.rows);
    zero(out->right[end], a.cols);
    out->sigma[end] = out->residual[end] = 0;
    out->ties[end] = 1;
  }
  for (int64_t i = 0; i < 2 * kMaxTies; ++i) {
    zero(out->block + i * out->block_stride, small_side(a));
  }
  for (int i = 0; i < 4; ++i) zero(out->state + i * out->block_stride, small_side(a));
  out->flags = 0;
  out->rank = a.want_full_rank ? small_side(a) : a.structural_rank;
}

// sigma, u and v of one end: v on the small side, u as the weighted sum of its images, which
// becomes a vector of length 1. residual: |A'A v - sigma^2 v|.
template <class L>
inline void write_pair(const SpectralMatrix& a, int end, const double* v, const L* images,
                       int64_t long_ld, const double* weights, int64_t count, double residual,
                       SpectralResult* out) {
  const bool wide = a.rows < a.cols;
  const int64_t n = small_side(a), m = long_side(a);
  double* small = wide ? out->left[end] : out->right[end];
  double* large = wide ? out->right[end] : out->left[end];
  copy(small, v, n);
  zero(large, m);
  for (int64_t c = 0; c < count; ++c) {
    const double weight = weights[c];
    const L* image = images + c * long_ld;
    for (int64_t i = 0; i < m; ++i) large[i] += weight * static_cast<double>(image[i]);
  }
  double squares = 0;
  constexpr int64_t kPart = 8;
  double parts[kPart] = {};
  int64_t i = 0;
  for (; i + kPart <= m; i += kPart) {
    for (int64_t p = 0; p < kPart; ++p) parts[p] += large[i + p] * large[i + p];
  }
  for (; i < m; ++i) squares += large[i] * large[i];
  for (const double part : parts) squares += part;
  const double sigma = std::sqrt(squares), inverse = sigma > 0 ? 1 / sigma : 0;
  for (i = 0; i < m; ++i) large[i] *= inverse;
  out->sigma[end] = sigma;
  out->residual[end] = residual * inverse;
}

}  // namespace tscnc::TSCNC_ISA
