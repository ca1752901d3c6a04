// Both ends of the spectrum in one Krylov space of A'A, from the vectors of the call before: after
// a small step of the weights one to three reads of the matrix are enough where no end is flat.
//
// A Ritz pair (theta, x) with residual r is off by at most |r|^2 / gap. The gap is estimated: it is
// measured to what else the space holds, less that one's own residual. What this estimate does not
// clear is left to the factorisations, and so is a pair that is close to another.
#include "warm_extremes.h"

#include "krylov.h"
#include "largest_by_passes.h"
#include "pass_operator.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr int kMostPasses = 6;
// Below these sides the factorisations take no longer.
constexpr int64_t kLeastSide = 16, kLeastSquare = 256;
// Relative errors of sigma_max and sigma_min to stop at, as the bound has them: the promised ones.
// What happened is smaller by an order of magnitude or more.
constexpr double kWarmError[2] = {1e-5, 1e-3};
// Largest ratio of the squared singular values: without a factor sigma_min converges no better than
// its gap relative to sigma_max^2, and rounding of the lanes grows with this ratio.
constexpr double kWarmSpread = 900;
// Ends: 2, or 1 for sigma_max alone. The block holds two vectors per end, the first of each end
// first.
template <class T, int Ends>
class WarmExtremes {
 public:
  using L = Compute<T>;
  static constexpr int kBlock = 2 * Ends, kMostVectors = kMostPasses * kBlock;

  WarmExtremes(const SpectralMatrix& a, const SpectralOptions& options, Pieces* pieces)
      : a_(a), options_(options), operator_(a, pieces), n_(operator_.n), ld_(operator_.ld) {
    basis_ = pieces->take(kMostVectors * ld_);
    images_ = pieces->take(kMostVectors * ld_);
    ritz_ = pieces->take(kBlock * ld_);
    ritz_images_ = pieces->take(kBlock * ld_);
    long_images_ = take_lanes<L>(pieces, kMostVectors * operator_.long_ld);
  }

  bool run(const double* warm, int64_t warm_stride, SpectralResult* out) {
    if (!start(warm, warm_stride)) return false;
    operator_.load(a_);
    const int64_t worth = n_ / 24, limit = Ends == 1 ? kMostPasses : worth < 2 ? 2 : worth;
    for (int64_t pass = 0; pass < kMostPasses && pass < limit; ++pass) {
      if (pass > 0 && !expand()) return false;
      apply();
      if (!in_range<L>(solve_projected())) return false;
      if (Ends == 2 && values_[size_ - 1] * kWarmSpread < values_[0]) return false;
      form_pairs();
      if (accepted()) {
        write(out);
        return true;
      }
    }
    return false;
  }

 private:
  double* basis(int64_t i) { return basis_ + i * ld_; }
  // Place of the k-th pair of the block among the descending Ritz values.
  int64_t place(int k) const {
    const int end = k % Ends, depth = k / Ends;
    return end == 0 ? depth : size_ - 1 - depth;
  }

  bool start(const double* warm, int64_t stride) {
    for (int k = 0; k < kBlock; ++k) {
      const int end = k % Ends, depth = k / Ends;
      double* x = basis(k);
      zero(x, ld_);
      copy(x, warm + (2 * end + depth) * stride, n_);
      if (normalise(x, ld_) == 0) return false;
      if (depth == 1) explore(x, n_, (1u << 13) + static_cast<uint64_t>(end));
      remove_dead(x);
      if (!append(k)) return false;
    }
    return true;
  }

  void remove_dead(double* x) const {
    const int64_t* kept_list = small_kept(a_);
    if (kept_list == nullptr) return;
    for (int64_t j = 0, at = 0; j < n_; ++j) {
      if (at < small_kept_count(a_) && kept_list[at] == j) {
        ++at;
      } else {
        x[j] = 0;
      }
    }
  }

  // Makes basis row k orthonormal to those before it.
  bool append(int64_t k) {
    double* x = basis(k);
    if (!(normalise(x, ld_) > 0)) return false;
    for (int round = 0; round < 2; ++round) {
      for (int64_t i = 0; i < k; ++i) add_scaled(x, -dot(basis(i), x, ld_), basis(i), ld_);
      if (!(normalise(x, ld_) > (round == 0 ? 1e-8 : 0.5))) return false;
    }
    return true;
  }

  void apply() {
    double* z = images_ + size_ * ld_;
    operator_.apply(basis(size_), long_images_ + size_ * operator_.long_ld, z);
    size_ += kBlock;
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = size_ - kBlock; j < size_; ++j) {
        projected_[i][j] = projected_[j][i] = dot(basis(i), images_ + j * ld_, ld_);
      }
    }
  }

  // The next Krylov block: what the last image has beyond the basis.
  bool expand() {
    copy(basis(size_), images_ + (size_ - kBlock) * ld_, kBlock * ld_);
    for (int64_t k = size_; k < size_ + kBlock; ++k) {
      if (!append(k)) return false;
    }
    return true;
  }

  // Returns the largest Ritz value, NaN where the matrix has brought one in.
  double solve_projected() {
    double scratch[kMostVectors * kMostVectors], work[3 * kMostVectors], sum = 0;
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = 0; j < size_; ++j) {
        scratch[i * size_ + j] = projected_[i][j];
        sum += projected_[i][j];
      }
    }
    if (!std::isfinite(sum)) return sum;
    small_eigen(size_, scratch, values_, vectors_, work);
    return values_[0];
  }

  void form_pairs() {
    zero(ritz_, kBlock * ld_);
    zero(ritz_images_, kBlock * ld_);
    for (int k = 0; k < kBlock; ++k) {
      const double* weights = vectors_ + place(k) * size_;
      double *x = ritz_ + k * ld_, *z = ritz_images_ + k * ld_;
      for (int64_t c = 0; c < size_; ++c) {
        add_scaled(x, weights[c], basis(c), ld_);
        add_scaled(z, weights[c], images_ + c * ld_, ld_);
      }
      const double value = values_[place(k)];
      double squares = 0;
      for (int64_t j = 0; j < n_; ++j) {
        const double r = z[j] - value * x[j];
        squares += r * r;
      }
      residual_[k] = std::sqrt(squares);
    }
  }

  bool accepted() const {
    const double close = 1 + options_.tie_tolerance, tie_gap = 1 - 1 / (close * close);
    for (int end = 0; end < Ends; ++end) {
      const double value = values_[place(end)], next = values_[place(end + Ends)];
      const double gap = std::fabs(value - next) - residual_[end + Ends];
      const double apart = tie_gap * (end == 0 ? value : next);
      if (!(gap > residual_[end] + apart)) return false;
      const double error = residual_[end] * residual_[end] / (gap * value) / 2;
      if (!(error <= kWarmError[end])) return false;
    }
    return true;
  }

  // The state is one step ahead of the pairs: A'A brings the largest out, sigma_max^2 - A'A the
  // smallest, and both images are at hand.
  void write(SpectralResult* out) {
    clear_result(a_, out);
    for (int k = 0; k < kBlock; ++k) {
      const int end = k % Ends, depth = k / Ends;
      double *x = ritz_ + k * ld_, *z = ritz_images_ + k * ld_;
      if (depth == 0) {
        write_pair(a_, end, x, long_images_, operator_.long_ld, vectors_ + place(k) * size_, size_,
                   residual_[k], out);
      }
      for (int64_t j = 0; j < n_ && end == 1; ++j) z[j] = values_[0] * x[j] - z[j];
      normalise(z, ld_);
      copy(out->block + (end * kMaxTies + depth) * out->block_stride, x, n_);
      copy(out->state + (2 * end + depth) * out->block_stride, z, n_);
    }
  }

  const SpectralMatrix& a_;
  const SpectralOptions& options_;
  PassOperator<T, kBlock> operator_;
  int64_t n_, ld_, size_ = 0;
  double *basis_, *images_, *ritz_, *ritz_images_;
  L* long_images_;
  double projected_[kMostVectors][kMostVectors], vectors_[kMostVectors * kMostVectors];
  double values_[kMostVectors], residual_[kBlock];
};

template <template <class> class Solver>
int64_t workspace_of(const SpectralMatrix& a) {
  int64_t size = 0;
  dispatch_dtype(a.dtype, [&](auto* tag) {
    const SpectralOptions options = {};
    Pieces pieces(nullptr);
    Solver<std::remove_pointer_t<decltype(tag)>>(a, options, &pieces);
    size = pieces.size();
  });
  return size;
}

template <class T>
using WarmBoth = WarmExtremes<T, 2>;

}  // namespace

int64_t pass_workspace(const SpectralMatrix& matrix) {
  const int64_t both = workspace_of<WarmBoth>(matrix), one = workspace_of<LargestByPasses>(matrix);
  return both > one ? both : one;
}

bool solve_by_passes(const SpectralMatrix& matrix, const SpectralOptions& options,
                     const double* warm, int64_t warm_stride, double* workspace,
                     SpectralResult* result) {
  // Removed lines of the small side, or a structural null space, are the factorisations'.
  const int64_t n = small_side(matrix);
  const bool whole = small_kept(matrix) == nullptr && matrix.structural_rank == n;
  const bool square = matrix.rows == matrix.cols && !options.largest_only;
  const bool starts = warm != nullptr && n >= (square ? kLeastSquare : kLeastSide) &&
                      !options.power && !options.certify;
  bool found = false;
  dispatch_dtype(matrix.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto run = [&](auto* solver) {
      using Solver = std::remove_pointer_t<decltype(solver)>;
      Pieces pieces(workspace);
      found = Solver(matrix, options, &pieces).run(warm, warm_stride, result);
    };
    if (!options.largest_only) {
      if (starts && whole) run(static_cast<WarmExtremes<T, 2>*>(nullptr));
      return;
    }
    if (starts) run(static_cast<WarmExtremes<T, 1>*>(nullptr));
    if (!found) run(static_cast<LargestByPasses<T>*>(nullptr));
  });
  return found;
}

}  // namespace tscnc::TSCNC_ISA
