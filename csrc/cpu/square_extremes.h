// Both ends of a square matrix without its Gram matrix: the largest from passes over A, the
// smallest from an fp32 elimination of A, which costs a quarter of an fp64 Gram matrix and its
// factor and loses u kappa where those would lose u kappa^2. What one step of iterative refinement
// with residuals in fp64 (Wilkinson 1963) would change tells how good the elimination was.
#pragma once

#include "elimination.h"
#include "extreme_pairs.h"
#include "pass_operator.h"
#include "tridiagonal.h"

namespace tscnc::TSCNC_ISA {

// Sizes from which elimination is quicker than the tridiagonal form, from a random start and from a
// state.
constexpr int64_t kLeastEliminated = 257, kLeastEliminatedWarm = 16;
// What the refinement corrects, as the square of |A dz| / |A z|: below the least it is the error of
// sigma^2 and small enough, up to the most its own square is.
constexpr double kLeastCorrected = 2e-6, kMostCorrected = 2e-3;
// Estimated relative error of sigma^2 at which a pair is taken.
constexpr double kEliminationError = 1e-5;
// Applications of an operator before the Gram matrix is the better way.
constexpr int64_t kMostApplied = 60;
// Relative error of sigma^2 at which a Krylov space that started from a state ends.
constexpr double kStartedError = 1e-6;

inline bool eliminates(const ExtremePairs& found, bool started) {
  const SpectralMatrix& source = found.source;
  return source.rows == source.cols && source.kept_rows == nullptr && source.kept_cols == nullptr &&
         source.dtype != DType::float64 && !found.options.power && !found.options.certify &&
         found.a.n >= (started ? kLeastEliminatedWarm : kLeastEliminated);
}

// Works on the pairs' workspace: the factors in `factor`, the passes' memory in `gram`.
class SquareExtremes {
 public:
  explicit SquareExtremes(ExtremePairs* pairs)
      : pairs_(*pairs),
        work_(pairs->work),
        n_(pairs->a.n),
        ld_(pairs->work.ld),
        lane_ld_(eliminated_ld(n_)),
        lanes_(reinterpret_cast<float*>(pairs->work.factor)) {}

  // The copy of A that run() destroys; returns |A|_F^2.
  double load() {
    const int64_t side = eliminated_side(n_);
    for (int64_t i = 0; i < side + 1; ++i) {
      const int64_t first = pairs_.a.sparse || i >= n_ ? 0 : n_;
      std::memset(lanes_ + i * lane_ld_ + first, 0,
                  static_cast<size_t>(lane_ld_ - first) * sizeof(float));
      if (i >= n_ && i < side) lanes_[i * lane_ld_ + i] = 1;
    }
    dispatch_dtype(pairs_.source.dtype,
                   [&](auto* tag) { copy_rows<std::remove_pointer_t<decltype(tag)>>(); });
    double squares = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const float* row = lanes_ + i * lane_ld_;
      squares += static_cast<double>(dot_of(row, row, 0, n_));
    }
    return squares;
  }

  // False where the promised errors are not certain.
  bool run(bool started) {
    Elimination elimination(lanes_, n_, reinterpret_cast<float*>(work_.packed));
    if (!elimination.run()) return false;
    for (int end = 0; end < 2 && started; ++end) {
      double* second = pairs_.block(end) + ld_;
      if (normalise(second, ld_) > 0) explore(second, n_, (1u << 13) + static_cast<uint64_t>(end));
    }
    find_largest(started);
    return trusted(0) && find_smallest(elimination, started);
  }

 private:
  template <class T>
  void copy_rows() {
    const TallMatrix& a = pairs_.a;
    for (int64_t i = 0; i < n_; ++i) {
      float* row = lanes_ + i * lane_ld_;
      if (a.sparse) {
        for (int64_t e = a.rows.begin[i]; e < a.rows.begin[i + 1]; ++e) {
          row[a.rows.column[e]] = static_cast<float>(a.rows.value[e]);
        }
      } else if (a.source->mask == nullptr) {
        const T* data = static_cast<const T*>(a.source->data) + i * n_;
        for (int64_t j = 0; j < n_; ++j) row[j] = static_cast<float>(to_double(data[j]));
      } else {
        for (int64_t j = 0; j < n_; ++j) row[j] = static_cast<float>(entry<T>(*a.source, i, j));
      }
    }
  }

  KrylovOptions limits(bool started) const {
    KrylovOptions options = pairs_.krylov_options();
    options.max_blocks = kMostApplied;
    if (started) {
      options.tolerance = kStartedError;
      options.first_check = 4;
    }
    return options;
  }

  bool trusted(int end) const {
    return pairs_.ties[end] == 1 && 2 * pairs_.error[end] <= kEliminationError;
  }

  void find_largest(bool started) {
    dispatch_dtype(pairs_.source.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      if constexpr (!std::is_same_v<T, double>) {
        Pieces pieces(work_.gram);
        PassOperator<T, 2> passes(pairs_.source, &pieces);
        double *x = pieces.take(2 * passes.ld), *z = pieces.take(2 * passes.ld);
        float* images = take_lanes<float>(&pieces, 2 * passes.long_ld);
        passes.load(pairs_.source);
        pairs_.find_leading(0, limits(started), [&](double* w0, double* w1) {
          copy(x, w0, passes.ld);
          copy(x + passes.ld, w1, passes.ld);
          passes.apply(x, images, z);
          copy(w0, z, passes.ld);
          copy(w1, z + passes.ld, passes.ld);
        });
      }
    });
  }

  // In lanes, with a power of two taken out so that nothing leaves their range.
  void apply_inverse(const Elimination& elimination, double* w0, double* w1) {
    float *x0 = reinterpret_cast<float*>(work_.gram), *x1 = x0 + lane_ld_;
    std::memset(x0, 0, static_cast<size_t>(2 * lane_ld_) * sizeof(float));
    for (int64_t j = 0; j < n_; ++j) {
      x0[j] = static_cast<float>(w0[j]);
      x1[j] = static_cast<float>(w1[j]);
    }
    elimination.apply_inverse_gram(x0, x1, x1 + lane_ld_, x1 + 2 * lane_ld_);
    for (int64_t j = 0; j < n_; ++j) {
      w0[j] = static_cast<double>(x0[j]);
      w1[j] = static_cast<double>(x1[j]);
    }
  }

  bool find_smallest(const Elimination& elimination, bool started) {
    double *v0 = pairs_.block(1), *v1 = v0 + ld_;
    uint64_t column = 1u << 10;
    for (double* v : {v0, v1}) {
      if (dot(v, v, ld_) == 0) fill_random(v, n_, ld_, column++);
    }
    if (!started) apply_inverse(elimination, v0, v1);
    pairs_.find_leading(1, limits(started),
                        [&](double* w0, double* w1) { apply_inverse(elimination, w0, w1); });
    return trusted(1) && close(elimination);
  }

  // Measures z = (A'A)^-1 x for the two leading vectors x, refined once where that changes it, and
  // estimates from x and z the error of x as a Ritz vector of the inverse.
  bool close(const Elimination& elimination) {
    const int64_t stride = work_.long_stride;
    double *from = work_.basis, *rest = from + 2 * ld_, *change = rest + 2 * ld_;
    double *x = work_.x, *z = x + 2 * ld_, *image = work_.y + 2 * stride;
    copy(from, pairs_.block(1), 2 * ld_);
    copy(x, pairs_.block(0), 2 * ld_);
    copy(z, from, 2 * ld_);
    apply_inverse(elimination, z, z + ld_);
    zero(work_.y, 4 * stride);
    multiply_both(pairs_.a, x, work_.y, stride, work_.z, ld_, work_.panel);
    for (int64_t i = 0; i < 2 * ld_; ++i) rest[i] = from[i] - work_.z[2 * ld_ + i];
    copy(change, rest, 2 * ld_);
    apply_inverse(elimination, change, change + ld_);
    const double corrected = std::fabs(dot(change, rest, ld_)) / dot(image, image, stride);
    if (!(corrected <= kMostCorrected)) return false;
    const bool refined = corrected > kLeastCorrected;
    add_scaled(change, 1, z, 2 * ld_);
    if (!judge(from, change, refined ? corrected * corrected : corrected)) return false;
    if (refined) {
      uint64_t column = 1u << 9;
      for (int64_t q = 0; q < 2; ++q) {
        append_orthonormal(change, q, n_, ld_, change + q * ld_, 0, &column);
      }
      copy(pairs_.block(1), change, 2 * ld_);
      pairs_.measure();
      return true;
    }
    orthonormalise_measured();
    pairs_.take_measured();
    return true;
  }

  // Whether x, of which z is (A'A)^-1 x, is as good as promised; rounding: relative error of
  // sigma^2 that z adds.
  bool judge(const double* x, const double* z, double rounding) {
    double value[2], squares[2] = {};
    for (int64_t q = 0; q < 2; ++q, x += ld_, z += ld_) {
      value[q] = dot(x, z, ld_);
      for (int64_t j = 0; j < n_; ++j) {
        const double r = z[j] - value[q] * x[j];
        squares[q] += r * r;
      }
    }
    const double gap = value[0] - value[1] - std::sqrt(squares[1]);
    if (!(gap > std::sqrt(squares[0]) + pairs_.krylov_options().tie_gap * value[0])) return false;
    pairs_.error[1] = (squares[0] / (gap * value[0]) + rounding) / 2;
    return trusted(1);
  }

  // Gram & Schmidt on the two vectors of the smallest end and on their images alike.
  void orthonormalise_measured() {
    const int64_t stride = work_.long_stride;
    double *x = work_.x + 2 * ld_, *y = work_.y + 2 * stride, *z = work_.z + 2 * ld_;
    const auto scale = [&](int64_t q) {
      const double inverse = 1 / std::sqrt(dot(x + q * ld_, x + q * ld_, ld_));
      for (int64_t j = 0; j < ld_; ++j) x[q * ld_ + j] *= inverse, z[q * ld_ + j] *= inverse;
      for (int64_t i = 0; i < stride; ++i) y[q * stride + i] *= inverse;
    };
    scale(0);
    scale(1);
    for (int round = 0; round < 2; ++round) {
      const double along = dot(x, x + ld_, ld_);
      add_scaled(x + ld_, -along, x, ld_);
      add_scaled(z + ld_, -along, z, ld_);
      add_scaled(y + stride, -along, y, stride);
      scale(1);
    }
  }

  ExtremePairs& pairs_;
  ForwardWorkspace& work_;
  int64_t n_, ld_, lane_ld_;
  float* lanes_;
};

}  // namespace tscnc::TSCNC_ISA
