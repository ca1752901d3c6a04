// The extreme singular values and vectors of one tall matrix, in its own compressed coordinates.
//
// v comes from the tridiagonal form of the Gram matrix where that is small, in fp32 where A is well
// conditioned; elsewhere from Krylov spaces of the fp64 Gram matrix (largest) and of the inverse of
// its Cholesky factor (smallest). The singular value is |Av| on A itself, which squares the error
// of v, and is never read off the Gram matrix.
#pragma once

#include "direct_extremes.h"
#include "row_qr.h"
#include "spectral_workspace.h"

namespace tscnc::TSCNC_ISA {

// Below this density scattered rank-1 updates beat the dense rank-k update.
constexpr double kSparseDensity = 0.25;
// The fp64 Gram matrix gives sigma_min to 1e-6 up to this condition number; beyond it A itself is
// factored.
constexpr double kGramCondition = 2e6;
// Sizes up to which both ends come from a tridiagonal matrix, reduced in fp64 and (from
// kLeastSingle on) in fp32, and the condition numbers of A up to which its vectors are good enough.
constexpr int64_t kDirectSize = 256, kSingleSize = 640, kLeastSingle = 32;
constexpr double kDirectCondition = 1e5, kSingleCondition = 20;
// Matrices closer to square than this are too ill conditioned for fp32.
constexpr double kSingleAspect = 1.3;
// Estimated relative error of sigma^2 above which the direct vectors are not taken.
constexpr double kDirectError = 1e-5, kDirectErrorDouble = 1e-13;
// Applications of an operator to a block of two vectors.
constexpr int64_t kMaxBlocks = 160;
constexpr int64_t kNullSteps = 3;
constexpr double kUnit = 0x1p-53;
// Shift of the refactored triangle beside a null space, relative to |A|_F: far above rounding,
// which keeps the null space from drowning the rest, and far below any sigma_r worth finding.
constexpr double kRefactorShift = 1e-13;

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

class ExtremeVectors {
 public:
  ExtremeVectors(const SpectralMatrix& source, const SpectralOptions& options, double* workspace)
      : a(make_tall(source)), work(source, workspace), source_(source), options_(options) {
    deficiency = a.n - source.structural_rank;
    a.rows = work.rows;
    a.sparse = source.mask != nullptr &&
               static_cast<double>(source.nnz) <
                   kSparseDensity * static_cast<double>(a.m) * static_cast<double>(a.n);
  }

  // The Gram matrix; returns its trace. fp64 storage is scaled by a power of two so that no square
  // leaves the range.
  double load() {
    if (source_.dtype == DType::float64) {
      const double largest = largest_entry();
      if (largest > 0 && std::isfinite(largest)) a.scale = std::ldexp(1.0, -std::ilogb(largest));
    }
    if (a.sparse) {
      dispatch_dtype(source_.dtype, [&](auto* tag) {
        build_sparse_rows<std::remove_pointer_t<decltype(tag)>>(&a, work.position);
      });
    }
    const bool steep = static_cast<double>(a.m) >= kSingleAspect * static_cast<double>(a.n);
    single_ = source_.dtype != DType::float64 && steep && a.n >= kLeastSingle &&
              a.n <= kSingleSize && may_go_direct();
    if (single_ && !options_.certify) {
      gram<float>(a, work.gram, work.ld, work.panel, work.packed, work.factor);
      // What the squares of fp32 cannot hold goes through fp64.
      rounded_ = find_trace() > 1e-20 && trace < 1e30;
    }
    if (!rounded_) load_exactly();
    return trace;
  }

  // Start vectors of both ends in the small side's full coordinates, four rows, or null.
  void start_from(const double* warm, int64_t stride) {
    zero(work.block, 2 * kMaxTies * work.ld);
    if (warm == nullptr) return;
    for (int i = 0; i < 4; ++i) {
      double* target = block(i / 2) + (i % 2) * work.ld;
      for (int64_t j = 0; j < a.n; ++j) target[j] = warm[i * stride + kept(a.short_kept, j)];
    }
  }

  void solve() {
    if (solve_directly()) return;
    if (rounded_) load_exactly();
    find_largest();
    factor();
    find_smallest();
    measure();
    const bool beyond = sigma[0] > kGramCondition * sigma[1];
    if (!beyond || (flags & kRefactored) != 0 || (deficiency > 0 && source_.want_full_rank)) return;
    refactor();
    if (deficiency > 0) find_null_space();
    find_smallest();
    measure();
  }

  double* block(int end) { return work.block + end * kMaxTies * work.ld; }

  TallMatrix a;
  ForwardWorkspace work;
  int64_t deficiency, flags = 0;
  double trace = 0;
  double sigma[2], residual[2];
  double error[2];  // estimated relative error of sigma
  int64_t ties[2];

 private:
  // What the direct way leaves to the Krylov spaces: null spaces and the power method.
  bool may_go_direct() const { return deficiency == 0 && !options_.power; }

  void load_exactly() {
    rounded_ = false;
    gram<double>(a, work.gram, work.ld, work.panel, work.packed, work.factor);
    find_trace();
  }

  double find_trace() {
    trace = 0;
    for (int64_t i = 0; i < a.n; ++i) trace += work.gram[i * work.ld + i];
    return trace;
  }

  // Both ends from the tridiagonal form of the Gram matrix; false, with its vectors as the start of
  // the Krylov spaces, where they may miss the promised error.
  bool solve_directly() {
    if (!may_go_direct() || !(single_ || a.n <= kDirectSize)) return false;
    const bool fp64 = source_.dtype == DType::float64;
    const double tie_gap = krylov_options().tie_gap, close = fp64 ? 0x1p-50 : 0x1p-26;
    const auto direct = single_ ? &direct_extremes<float> : &direct_extremes<double>;
    DirectResult found;
    if (!direct(work.gram, work.ld, a.n, trace, close, tie_gap, work.factor, work.basis, block(0),
                block(1), &found)) {
      zero(work.block, 2 * kMaxTies * work.ld);
      return false;
    }
    const double* value = found.values;
    const double condition = single_ ? kSingleCondition : kDirectCondition;
    if (!(value[0] <= condition * condition * value[2])) return false;
    if (found.ties[0] > 2 || found.ties[1] > 2) return false;
    measure(rounded_);
    for (int end = 0; end < 2; ++end) {
      ties[end] = found.ties[end];
      const double apart = std::fabs(value[2 * end + 1] / value[2 * end] - 1);
      const double gap = ties[end] == 1 ? apart : tie_gap;
      const double rest = residual[end] / sigma[end];
      const double square = rest < gap ? rest * rest / gap : rest;
      if (!(square <= (fp64 ? kDirectErrorDouble : kDirectError))) return false;
      error[end] = square / 2;
    }
    return true;
  }

  double largest_entry() {
    TallMatrix dense = a;
    dense.sparse = false;
    double largest = 0;
    for (int64_t row = 0; row < a.m; ++row) {
      load_rows(dense, row, 1, work.panel, work.ld);
      for (int64_t j = 0; j < a.n; ++j) {
        const double size = std::fabs(work.panel[j]);
        if (!(size <= largest)) largest = size;
      }
    }
    return largest;
  }

  KrylovOptions krylov_options() const {
    // The square of the vectors' error: fp64 matrices to rounding, fp32 well inside the promised
    // error.
    const bool small = a.n <= 64, fp64 = source_.dtype == DType::float64;
    const double close = 1 + options_.tie_tolerance;
    return {fp64 ? 1e-21 : (small ? 1e-10 : 1e-6), 1 - 1 / (close * close), kMaxBlocks};
  }

  template <class Apply>
  void find_leading(int end, const Apply& apply) {
    KrylovResult result;
    if (options_.power) {
      result = power_iteration(apply, a.n, work.ld, krylov_options(), work.basis, block(end));
    } else {
      KrylovSpace space(a.n, work.ld, work.basis);
      result = space.run(apply, krylov_options(), block(end));
    }
    ties[end] = result.ties;
    error[end] = result.error / 2;
  }

  void find_largest() {
    find_leading(0, [&](double* w0, double* w1) {
      double *z0 = work.z, *z1 = z0 + work.ld;
      symmetric_multiply(work.gram, work.ld, a.n, w0, w1, z0, z1);
      copy(w0, z0, work.ld);
      copy(w1, z1, work.ld);
    });
  }

  void factor() {
    copy(work.factor, work.gram, symmetric_size(a.n));
    if (deficiency > 0) {
      const double shift = 4 * kUnit * trace;
      for (int64_t i = 0; i < a.n; ++i) work.factor[i * work.ld + i] += shift;
      flags |= kShifted;
    }
    if (!cholesky(work.factor, work.ld, a.n, work.packed)) refactor();
    if (deficiency > 0 && !source_.want_full_rank) find_null_space();
  }

  // R from A itself, for matrices that the Gram matrix cannot resolve.
  void refactor() {
    flags |= kRefactored;
    row_qr(a, work.factor, work.ld, work.panel, work.packed);
    if (deficiency > 0) {
      fold_identity(work.factor, work.ld, a.n, kRefactorShift * std::sqrt(trace), work.panel,
                    work.packed);
    }
    double largest = 0;
    for (int64_t i = 0; i < a.n; ++i) {
      const double pivot = std::fabs(work.factor[i * work.ld + i]);
      if (pivot > largest) largest = pivot;
    }
    for (int64_t i = 0; i < a.n; ++i) {
      double& pivot = work.factor[i * work.ld + i];
      if (std::fabs(pivot) > 0x1p-60 * largest) continue;
      pivot = 0x1p-60 * largest;
      flags |= kShifted;
    }
  }

  // The structural null space by block inverse iteration on the shifted Gram matrix: each step
  // shrinks what is outside it by shift / sigma_r^2.
  void find_null_space() {
    const int64_t ld = work.ld;
    for (int64_t i = 0; i < deficiency; ++i) {
      fill_random(work.null_space + i * ld, a.n, ld, (1u << 11) + static_cast<uint64_t>(i));
    }
    uint64_t column = 1u << 12;
    for (int64_t step = 0; step < kNullSteps; ++step) {
      zero(work.null_space + deficiency * ld, ld);
      for (int64_t i = 0; i < deficiency; i += 2) {
        double *x0 = work.null_space + i * ld, *x1 = x0 + ld;
        solve_transposed(work.factor, ld, a.n, x0, x1);
        solve_upper(work.factor, ld, a.n, x0, x1);
      }
      for (int64_t i = 0; i < deficiency; ++i) {
        append_orthonormal(work.null_space, i, a.n, ld, work.null_space + i * ld, 0, &column);
      }
    }
    null_count_ = deficiency;
  }

  // Removes the structural null space.
  void project(double* w) {
    for (int64_t i = 0; i < null_count_; ++i) {
      const double* row = work.null_space + i * work.ld;
      add_scaled(w, -dot(row, w, work.ld), row, work.ld);
    }
  }

  void apply_inverse(double* w0, double* w1) {
    project(w0);
    project(w1);
    solve_transposed(work.factor, work.ld, a.n, w0, w1);
    solve_upper(work.factor, work.ld, a.n, w0, w1);
    project(w0);
    project(w1);
  }

  // Lanczos on the inverse, from a filtered start, with one closing inverse step.
  void find_smallest() {
    double *v0 = block(1), *v1 = v0 + work.ld;
    uint64_t column = 1u << 10;
    for (double* v : {v0, v1}) {
      if (dot(v, v, work.ld) > 0) continue;
      fill_random(v, a.n, work.ld, column++);
    }
    apply_inverse(v0, v1);
    find_leading(1, [&](double* w0, double* w1) { apply_inverse(w0, w1); });
    const int64_t available = a.n - null_count_;
    int64_t count = ties[1] > 2 ? ties[1] : 2;
    if (count > available) count = available;
    for (int64_t i = 0; i < count; i += 2) {
      double *even = block(1) + i * work.ld, *odd = even + work.ld;
      if (i + 1 == count) zero(odd, work.ld);
      apply_inverse(even, odd);
    }
    for (int64_t i = 0; i < count; ++i) {
      append_orthonormal(block(1), i, a.n, work.ld, block(1) + i * work.ld, 0, &column);
    }
    if (count < 2) zero(v1, work.ld);
  }

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
    dispatch_dtype(source_.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      if constexpr (!std::is_same_v<T, double>) {
        for (int q = 0; q < 4; ++q) {
          for (int64_t j = 0; j < ld; ++j) {
            work.lane_x[q * ld + j] = j < a.n ? static_cast<float>(work.x[q * work.ld + j]) : 0;
          }
        }
        const FusedPass<T, 4> pass(source_, nullptr, work.lanes);
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

  const SpectralMatrix& source_;
  const SpectralOptions& options_;
  int64_t null_count_ = 0;
  bool single_ = false;   // the direct way works in fp32
  bool rounded_ = false;  // the Gram matrix was summed in fp32
};

}  // namespace tscnc::TSCNC_ISA
