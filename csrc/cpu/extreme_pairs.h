// The two leading singular pairs of each end, from rough vectors of the small side: their measure
// on A itself, and what every way to find them shares.
#pragma once

#include "spectral_workspace.h"

namespace tscnc::TSCNC_ISA {

// Applications of an operator to a block of two vectors.
constexpr int64_t kMaxBlocks = 160;

inline TallMatrix make_tall(const SpectralMatrix& source) {
  TallMatrix a = {};
  a.source = &source;
  a.transposed = source.kept_row_count < source.kept_col_count;
  a.m = a.transposed ? source.kept_col_count : source.kept_row_count;
  a.n = a.transposed ? source.kept_row_count : source.kept_col_count;
  a.long_kept = a.transposed ? source.kept_cols : source.kept_rows;
  a.short_kept = a.transposed ? source.kept_rows : source.kept_cols;
  a.scale = 1;
  return a;
}

struct ExtremePairs {
  ExtremePairs(const SpectralMatrix& matrix, const SpectralOptions& settings, double* workspace)
      : source(matrix), options(settings), a(make_tall(matrix)), work(matrix, workspace) {}

  KrylovOptions krylov_options() const {
    // The square of the vectors' error: fp64 matrices to rounding, fp32 well inside the promised
    // error.
    const bool small = a.n <= 64, fp64 = source.dtype == DType::float64;
    const double close = 1 + options.tie_tolerance;
    return {fp64 ? 1e-21 : (small ? 1e-10 : 1e-6), 1 - 1 / (close * close), kMaxBlocks};
  }

  template <class Apply>
  void find_leading(int end, const KrylovOptions& limits, const Apply& apply) {
    KrylovResult result;
    if (options.power) {
      result = power_iteration(apply, a.n, work.ld, limits, work.basis, block(end));
    } else {
      KrylovSpace space(a.n, work.ld, work.basis);
      result = space.run(apply, limits, block(end));
    }
    ties[end] = result.ties;
    error[end] = result.error / 2;
  }

  double* block(int end) { return work.block + end * kMaxTies * work.ld; }

  // Both ends in one pass over A: singular values as |Av|, the two leading vectors of each end
  // turned into each other's optimum. Leaves v in work.x and u in work.y, two rows per end. lanes:
  // A's condition allows fp32 products.
  void measure(bool lanes = false) {
    const int64_t ld = work.ld, stride = work.long_stride;
    copy(work.x, block(0), 2 * ld);
    copy(work.x + 2 * ld, block(1), 2 * ld);
    zero(work.y, 4 * stride);
    if (!lanes || !multiply_in_lanes()) {
      multiply_both(a, work.x, work.y, stride, work.z, ld, work.panel);
    }
    take_measured();
  }

  // From what measure() multiplies: two orthonormal vectors per end in work.x, their images under A
  // in work.y and under A'A in work.z.
  void take_measured() {
    const int64_t ld = work.ld, stride = work.long_stride;
    for (int end = 0; end < 2; ++end) {
      if (a.n > 1) turn_pair(end);
      double *x = work.x + 2 * end * ld, *y = work.y + 2 * end * stride;
      sigma[end] = std::sqrt(dot(y, y, stride));
      copy(block(end), x, 2 * ld);
      const double inverse = sigma[end] > 0 ? 1 / sigma[end] : 0;
      double squares = 0;
      for (int64_t j = 0; j < a.n; ++j) {
        const double r = work.z[2 * end * ld + j] * inverse - sigma[end] * x[j];
        squares += r * r;
      }
      residual[end] = std::sqrt(squares);
      for (int64_t i = 0; i < stride; ++i) y[i] *= inverse;
    }
  }

  // multiply_both in one fused pass of fp32 products; false where the stored matrix is not A.
  bool multiply_in_lanes() {
    if (a.sparse || a.short_kept != nullptr || a.long_kept != nullptr) return false;
    const int64_t ld = work.lane_ld, stride = work.lane_stride;
    dispatch_dtype(source.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      if constexpr (!std::is_same_v<T, double>) {
        for (int q = 0; q < 4; ++q) {
          for (int64_t j = 0; j < ld; ++j) {
            work.lane_x[q * ld + j] = j < a.n ? static_cast<float>(work.x[q * work.ld + j]) : 0;
          }
        }
        const FusedPass<T, 4> pass(source, nullptr, work.lanes);
        pass.run(work.lane_x, work.lane_y, stride, work.z, work.ld);
      }
    });
    for (int q = 0; q < 4; ++q) {
      for (int64_t i = 0; i < a.m; ++i) {
        work.y[q * work.long_stride + i] = static_cast<double>(work.lane_y[q * stride + i]);
      }
    }
    return true;
  }

  // One Jacobi rotation of the pair (x0, x1) that makes A x0 and A x1 orthogonal, the extreme one
  // first.
  void turn_pair(int end) {
    const int64_t ld = work.ld, stride = work.long_stride;
    double *x = work.x + 2 * end * ld, *y = work.y + 2 * end * stride, *z = work.z + 2 * end * ld;
    if (dot(x + ld, x + ld, ld) == 0) return;
    const double p = dot(y, y, stride), q = dot(y, y + stride, stride);
    const double r = dot(y + stride, y + stride, stride);
    double tangent = 0;
    if (q != 0) {
      const double tau = (r - p) / (2 * q);
      tangent = (tau >= 0 ? 1 : -1) / (std::fabs(tau) + std::sqrt(1 + tau * tau));
    }
    const double cosine = 1 / std::sqrt(1 + tangent * tangent), sine = tangent * cosine;
    const double first = p - tangent * q, second = r + tangent * q;
    const bool swap = end == 0 ? first < second : first > second;
    const auto turn = [&](double* s, double* t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const double kept_side = cosine * s[i] - sine * t[i], other = sine * s[i] + cosine * t[i];
        s[i] = swap ? other : kept_side;
        t[i] = swap ? kept_side : other;
      }
    };
    turn(x, x + ld, ld);
    turn(y, y + stride, stride);
    turn(z, z + ld, ld);
  }

  const SpectralMatrix& source;
  const SpectralOptions& options;
  TallMatrix a;
  ForwardWorkspace work;
  int64_t deficiency, flags = 0;
  double trace = 0;
  double sigma[2], residual[2];
  double error[2];  // estimated relative error of sigma
  int64_t ties[2];
};

}  // namespace tscnc::TSCNC_ISA
