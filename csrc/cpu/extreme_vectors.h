// The extreme singular values and vectors of one tall matrix, in its own compressed coordinates.
//
// v comes from the tridiagonal form of the Gram matrix where that is small, in fp32 where A is well
// conditioned; elsewhere from Krylov spaces of the fp64 Gram matrix (largest) and of the inverse of
// its Cholesky factor (smallest). The singular value is |Av| on A itself, which squares the error
// of v, and is never read off the Gram matrix.
#pragma once

#include "direct_extremes.h"
#include "row_qr.h"
#include "square_extremes.h"
#include "tall_gram.h"

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
constexpr int64_t kNullSteps = 3;
// Operator applications that look for a condition beyond fp32, and what they take for one.
constexpr int64_t kSteepBlocks = 5;
constexpr double kSteepSpread = 150;
constexpr double kUnit = 0x1p-53;
// Shift of the refactored triangle beside a null space, relative to |A|_F: far above rounding,
// which keeps the null space from drowning the rest, and far below any sigma_r worth finding.
constexpr double kRefactorShift = 1e-13;

class ExtremeVectors : public ExtremePairs {
 public:
  ExtremeVectors(const SpectralMatrix& matrix, const SpectralOptions& settings, double* workspace)
      : ExtremePairs(matrix, settings, workspace) {
    deficiency = a.n - source.structural_rank;
    a.rows = work.rows;
    a.sparse = source.mask != nullptr &&
               static_cast<double>(source.nnz) <
                   kSparseDensity * static_cast<double>(a.m) * static_cast<double>(a.n);
  }

  // What the ways that solve() tries first work on; returns |A|_F^2. fp64 storage is scaled by a
  // power of two so that no square leaves the range. After start_from().
  double load() {
    if (source.dtype == DType::float64) {
      const double largest = largest_entry();
      if (largest > 0 && std::isfinite(largest)) a.scale = std::ldexp(1.0, -std::ilogb(largest));
    }
    if (a.sparse) {
      dispatch_dtype(source.dtype, [&](auto* tag) {
        build_sparse_rows<std::remove_pointer_t<decltype(tag)>>(&a, work.position);
      });
    }
    by_elimination_ = deficiency == 0 && eliminates(*this, started_);
    if (by_elimination_) {
      trace = SquareExtremes(this).load();
      by_elimination_ = fits_in_single(trace);
      if (by_elimination_) return trace;
    }
    const bool steep = static_cast<double>(a.m) >= kSingleAspect * static_cast<double>(a.n);
    single_ = source.dtype != DType::float64 && steep && a.n >= kLeastSingle &&
              a.n <= kSingleSize && may_go_direct();
    if (single_ && !options.certify) load_rounded();
    if (!rounded_) load_exactly();
    return trace;
  }

  // Start vectors of both ends in the small side's full coordinates, four rows, or null.
  void start_from(const double* warm, int64_t stride) {
    forget_start();
    started_ = warm != nullptr;
    if (!started_) return;
    for (int i = 0; i < 4; ++i) {
      double* target = block(i / 2) + (i % 2) * work.ld;
      for (int64_t j = 0; j < a.n; ++j) target[j] = warm[i * stride + kept(a.short_kept, j)];
    }
  }

  void solve() {
    if (by_elimination_) {
      if (SquareExtremes(this).run(started_)) return;
      forget_start();
      load_exactly();
    }
    if (solve_directly()) return;
    if (rounded_) load_exactly();
    find_largest();
    factor();
    find_smallest();
    measure();
    const bool beyond = sigma[0] > kGramCondition * sigma[1];
    if (!beyond || (flags & kRefactored) != 0 || (deficiency > 0 && source.want_full_rank)) return;
    refactor();
    if (deficiency > 0) find_null_space();
    find_smallest();
    measure();
  }

 private:
  void forget_start() {
    for (int end = 0; end < 2; ++end) zero(block(end), 2 * work.ld);
  }

  // Whether fp32 holds the squares of a matrix with this sum of them.
  static bool fits_in_single(double squares) { return squares > 1e-20 && squares < 1e30; }

  // What the direct way leaves to the Krylov spaces: null spaces and the power method.
  bool may_go_direct() const { return deficiency == 0 && !options.power; }

  // In fp32, unless the first rows show already that this is too little, or its range is.
  void load_rounded() {
    const int64_t size = symmetric_size(a.n), part = 2 * a.n;
    if (a.sparse || a.n <= kDirectSize || a.m < 2 * part) {
      gram<float>(a, work.gram, work.ld, work.panel, work.packed, work.factor);
    } else {
      zero(work.gram, size);
      add_gram<float>(a, 0, part, work.gram, work.ld, work.panel, work.packed);
      single_ = !looks_steep();
      if (!single_) return;
      seen_flat_ = true;
      add_gram<float>(a, part, a.m, work.gram, work.ld, work.panel, work.packed);
    }
    rounded_ = fits_in_single(find_trace());
  }

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
    const bool fp64 = source.dtype == DType::float64;
    if (single_ && !seen_flat_ && looks_steep()) return false;
    const double tie_gap = krylov_options().tie_gap, close = fp64 ? 0x1p-50 : 0x1p-26;
    const auto direct = single_ ? &direct_extremes<float> : &direct_extremes<double>;
    DirectResult found;
    if (!direct(work.gram, work.ld, a.n, trace, close, tie_gap, work.factor, work.basis, block(0),
                block(1), &found)) {
      forget_start();
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

  auto gram_operator() {
    return [this](double* w0, double* w1) {
      double *z0 = work.z, *z1 = z0 + work.ld;
      symmetric_multiply(work.gram, work.ld, a.n, w0, w1, z0, z1);
      copy(w0, z0, work.ld);
      copy(w1, z1, work.ld);
    };
  }

  // Whether a few steps into the Krylov space, whose values lie between those of the Gram matrix,
  // already span so much that all of it is more than fp32 can take. Small matrices are reduced
  // sooner. Leaves a start for find_largest().
  bool looks_steep() {
    if (a.n <= kDirectSize) return false;
    KrylovOptions options = krylov_options();
    options.tolerance = 0;
    options.max_blocks = kSteepBlocks;
    KrylovSpace space(a.n, work.ld, work.basis);
    const KrylovResult seen = space.run(gram_operator(), options, block(0));
    return seen.spread > kSteepSpread;
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

  void find_largest() { find_leading(0, krylov_options(), gram_operator()); }

  void factor() {
    copy(work.factor, work.gram, symmetric_size(a.n));
    if (deficiency > 0) {
      const double shift = 4 * kUnit * trace;
      for (int64_t i = 0; i < a.n; ++i) work.factor[i * work.ld + i] += shift;
      flags |= kShifted;
    }
    if (!cholesky(work.factor, work.ld, a.n, work.packed)) refactor();
    if (deficiency > 0 && !source.want_full_rank) find_null_space();
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
    find_leading(1, krylov_options(), [&](double* w0, double* w1) { apply_inverse(w0, w1); });
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

  int64_t null_count_ = 0;
  bool started_ = false;         // from a state
  bool by_elimination_ = false;  // A was copied for SquareExtremes instead of multiplied
  bool single_ = false;          // the direct way works in fp32
  bool seen_flat_ = false;       // looks_steep() has seen a part of A
  bool rounded_ = false;         // the Gram matrix was summed in fp32
};

}  // namespace tscnc::TSCNC_ISA
