// sigma_max alone, by block Lanczos on A'A that is never formed.
#pragma once

#include "krylov.h"
#include "pass_operator.h"

namespace tscnc::TSCNC_ISA {

template <class T>
class LargestByPasses {
 public:
  using L = Compute<T>;
  static constexpr int kBlock = 2;
  // Applications of A'A to a block of two vectors.
  static constexpr int64_t kMostPasses = 160;
  static constexpr double kPromised = 1e-3;

  LargestByPasses(const SpectralMatrix& a, const SpectralOptions& options, Pieces* pieces)
      : a_(a), options_(options), operator_(a, pieces), n_(operator_.n), ld_(operator_.ld) {
    basis_ = pieces->take((kMaxBasis + 2) * ld_);
    block_ = pieces->take(kMaxTies * ld_);
    x_ = pieces->take(kBlock * ld_);
    z_ = pieces->take(kBlock * ld_);
    long_images_ = take_lanes<L>(pieces, kBlock * operator_.long_ld);
  }

  // warm: two vectors, or null.
  bool run(const double* warm, int64_t warm_stride, SpectralResult* out) {
    operator_.load(a_);
    if (!start(warm, warm_stride)) return false;
    const KrylovResult found = solve();
    apply(block_, block_ + ld_);
    const double value = dot(x_, z_, ld_);
    if (!in_range<L>(value)) return false;
    double squares = 0;
    for (int64_t j = 0; j < n_; ++j) {
      const double r = z_[j] - value * x_[j];
      squares += r * r;
    }
    clear_result(a_, out);
    const double whole = 1;
    write_pair(a_, 0, block_, long_images_, operator_.long_ld, &whole, 1, std::sqrt(squares), out);
    out->ties[0] = found.ties;
    if (found.error / 2 > kPromised) out->flags |= kCapReached;
    const int64_t two = n_ < 2 ? n_ : 2, count = found.ties > two ? found.ties : two;
    for (int64_t i = 0; i < count; ++i) {
      copy(out->block + i * out->block_stride, block_ + i * ld_, n_);
    }
    for (int64_t i = 0; i < two; ++i)
      copy(out->state + i * out->block_stride, block_ + i * ld_, n_);
    return true;
  }

 private:
  // z := A'A x for a block given as two rows.
  void apply(const double* x0, const double* x1) {
    copy(x_, x0, ld_);
    copy(x_ + ld_, x1, ld_);
    operator_.apply(x_, long_images_, z_);
  }

  // Removed lines of the small side stay zero in A'A x, so that one application keeps them out.
  bool start(const double* warm, int64_t stride) {
    zero(block_, kMaxTies * ld_);
    for (int64_t k = 0; k < kBlock; ++k) {
      double* x = block_ + k * ld_;
      if (warm != nullptr) copy(x, warm + k * stride, n_);
      if (normalise(x, ld_) == 0) fill_random(x, n_, ld_, (1u << 14) + static_cast<uint64_t>(k));
      normalise(x, ld_);
    }
    apply(block_, block_ + ld_);
    double largest = 0;
    for (int64_t k = 0; k < kBlock; ++k) {
      const double squares = dot(z_ + k * ld_, z_ + k * ld_, ld_);
      if (!(squares <= largest)) largest = squares;
    }
    if (!in_range<L>(std::sqrt(largest))) return false;
    copy(block_, z_, kBlock * ld_);
    if (n_ < 2) zero(block_ + ld_, ld_);
    return true;
  }

  KrylovResult solve() {
    const bool fp64 = sizeof(L) == sizeof(double);
    const double close = 1 + options_.tie_tolerance;
    const KrylovOptions options = {fp64       ? 1e-21
                                   : n_ <= 64 ? 1e-10
                                              : 1e-6,
                                   1 - 1 / (close * close), kMostPasses};
    const auto operate = [&](double* w0, double* w1) {
      apply(w0, w1);
      copy(w0, z_, ld_);
      copy(w1, z_ + ld_, ld_);
    };
    if (options_.power) return power_iteration(operate, n_, ld_, options, basis_, block_);
    KrylovSpace space(n_, ld_, basis_);
    return space.run(operate, options, block_);
  }

  const SpectralMatrix& a_;
  const SpectralOptions& options_;
  PassOperator<T, kBlock> operator_;
  int64_t n_, ld_;
  double *basis_, *block_, *x_, *z_;
  L* long_images_;
};

}  // namespace tscnc::TSCNC_ISA
