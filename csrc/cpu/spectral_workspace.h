// Where the spectral kernels keep what they work on: one buffer of fp64 from the caller, cut into
// pieces.
#pragma once

#include "fused_pass.h"
#include "krylov.h"
#include "tall_matrix.h"

namespace tscnc::TSCNC_ISA {

inline void zero(double* x, int64_t count) {
  std::memset(x, 0, static_cast<size_t>(count) * sizeof(double));
}

inline void copy(double* to, const double* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(double));
}

// Takes pieces off a buffer, each on a cache line; with a null buffer it only counts.
class Pieces {
 public:
  explicit Pieces(double* base) : base_(base) {}

  double* take(int64_t count) {
    double* piece = base_ == nullptr ? nullptr : base_ + size_;
    size_ += (count + 7) / 8 * 8;
    return piece;
  }

  int64_t size() const { return size_; }

 private:
  double* base_;
  int64_t size_ = 0;
};

inline int64_t long_length(const SpectralMatrix& a) {
  return ((a.rows > a.cols ? a.rows : a.cols) + kColumns + 15) / 8 * 8;
}

struct ForwardWorkspace {
  int64_t ld, long_stride;
  double *gram, *factor, *panel, *packed, *basis, *block, *x, *z, *y, *null_space;
  SparseRows rows;
  int32_t* position;
  float *lane_x, *lane_y, *lanes;  // of one fused pass in fp32, for types narrower than fp64
  int64_t lane_ld, lane_stride, size;

  ForwardWorkspace(const SpectralMatrix& a, double* base) {
    const int64_t m = a.kept_row_count > a.kept_col_count ? a.kept_row_count : a.kept_col_count;
    const int64_t n = a.kept_row_count + a.kept_col_count - m;
    ld = padded_length(n);
    long_stride = long_length(a);
    Pieces pieces(base);
    gram = pieces.take(symmetric_size(n));
    factor = pieces.take(symmetric_size(n));
    panel = pieces.take(kUpdateDepth<double> * ld);
    packed = pieces.take(packed_size(n));
    basis = pieces.take((kMaxBasis + 2) * ld);
    block = pieces.take(2 * kMaxTies * ld);
    x = pieces.take(4 * ld);
    z = pieces.take(4 * ld);
    y = pieces.take(4 * long_stride);
    null_space = pieces.take((n - a.structural_rank + 2) * ld);
    rows.begin = reinterpret_cast<int64_t*>(pieces.take(m + 1));
    rows.column = reinterpret_cast<int32_t*>(pieces.take((a.nnz + 1) / 2));
    rows.value = pieces.take(a.nnz);
    position = reinterpret_cast<int32_t*>(pieces.take((a.rows + a.cols + 1) / 2));
    lane_ld = lane_length(n);
    lane_stride = lane_length(m);
    const bool narrow = a.dtype != DType::float64;
    lane_x = reinterpret_cast<float*>(pieces.take(narrow ? 2 * lane_ld : 0));
    lane_y = reinterpret_cast<float*>(pieces.take(narrow ? 2 * lane_stride : 0));
    lanes = reinterpret_cast<float*>(
        pieces.take(narrow ? (FusedPass<float, 4>::scratch_size(a) + 1) / 2 : 0));
    size = pieces.size();
  }
};

struct BackwardWorkspace {
  int64_t ld, long_stride, right_stride;
  double *x, *z, *panel, *partners, *rights;
  int64_t size;

  BackwardWorkspace(const SpectralMatrix& a, double* base) {
    ld = padded_length(a.rows < a.cols ? a.rows : a.cols);
    long_stride = long_length(a);
    Pieces pieces(base);
    x = pieces.take(4 * ld);
    z = pieces.take(4 * ld);
    panel = pieces.take(kColumns * ld);
    partners = pieces.take((2 * kMaxTies + 4) * long_stride);
    right_stride = (a.cols + 63) / 64 * 64;
    rights = pieces.take(2 * kMaxTies * right_stride);
    size = pieces.size();
  }
};

}  // namespace tscnc::TSCNC_ISA
