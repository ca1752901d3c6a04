// Leading eigenpairs of a symmetric operator by block Lanczos with two vectors, full
// reorthogonalisation and thick restarts (Golub & Underwood 1977; Wu & Simon 2000). The projected
// matrix is formed explicitly, so it is Q'AQ whatever the basis went through: restarts, exhausted
// blocks, fresh random columns.
#pragma once

#include <initializer_list>

#include "dense_symmetric.h"
#include "extreme_singular_values.h"
#include "small_eigen.h"

namespace tscnc::TSCNC_ISA {

constexpr int64_t kMaxBasis = 48;
// An error this small that no longer shrinks is rounding.
constexpr double kStallError = 1e-12;

// Pseudo-random in (-1, 1) from a counter (SplitMix64): the same for every run, thread and list
// position.
inline double counter_uniform(uint64_t column, uint64_t index) {
  uint64_t z = (column << 40) + index + 1;
  z *= 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(static_cast<int64_t>(z)) * 0x1p-63;
}

inline void fill_random(double* x, int64_t n, int64_t ld, uint64_t column) {
  for (int64_t i = 0; i < ld; ++i) x[i] = i < n ? counter_uniform(column, i) : 0;
}

// What of the second vector of a warm start is random, so that a direction which the start lacks
// grows from call to call.
constexpr double kExploration = 1e-3;

// Adds the random part to x of length 1.
inline void explore(double* x, int64_t n, uint64_t column) {
  const double scale = kExploration * std::sqrt(3.0 / static_cast<double>(n));
  for (int64_t j = 0; j < n; ++j) x[j] += scale * counter_uniform(column, j);
}

// Scales x to length 1 and returns its former length; 0 where that is 0 or not finite.
inline double normalise(double* x, int64_t ld) {
  const double norm = std::sqrt(dot(x, x, ld));
  if (!(norm > 0) || !std::isfinite(norm)) return 0;
  for (int64_t i = 0; i < ld; ++i) x[i] /= norm;
  return norm;
}

// Makes x orthogonal to `count` orthonormal rows (twice is enough) and of length 1; where less than
// `tiny` of it is left, a fresh random column takes its place.
inline void append_orthonormal(const double* rows, int64_t count, int64_t n, int64_t ld, double* x,
                               double tiny, uint64_t* column) {
  for (int attempt = 0; attempt < 4; ++attempt) {
    double norm = normalise(x, ld);
    bool usable = norm > tiny;
    for (int pass = 0; pass < 2 && usable; ++pass) {
      for (int64_t i = 0; i < count; ++i)
        add_scaled(x, -dot(rows + i * ld, x, ld), rows + i * ld, ld);
      usable = normalise(x, ld) > (pass == 0 ? 1e-10 : 0.5);
    }
    if (usable) return;
    fill_random(x, n, ld, (*column)++);
    tiny = 0;
  }
}

struct KrylovOptions {
  double tolerance;    // relative error of the leading eigenvalue to stop at
  double tie_gap;      // relative gap below which eigenvalues count as tied
  int64_t max_blocks;  // operator applications, two vectors each
  // Size of the space at which the error is estimated first, small for a good start.
  int64_t first_check = 8;
};

struct KrylovResult {
  double error;       // estimated relative error of the leading eigenvalue
  int64_t ties;       // leading eigenvalues within tie_gap, at most kMaxTies
  double spread = 1;  // the largest Ritz value by the smallest one, infinite where that is not > 0
};

class KrylovSpace {
 public:
  // basis: (kMaxBasis + 2) * ld.
  KrylovSpace(int64_t n, int64_t ld, double* basis) : n_(n), ld_(ld), basis_(basis) {}

  // block: kMaxTies * ld; its first two rows hold the start, random where they are zero, and
  // afterwards the leading eigenvectors, at least two where n allows.
  template <class Apply>
  KrylovResult run(const Apply& apply, const KrylovOptions& options, double* block) {
    const int64_t limit = n_ < kMaxBasis ? n_ : kMaxBasis;
    double *w0 = basis_ + kMaxBasis * ld_, *w1 = w0 + ld_;
    std::memcpy(w0, block, static_cast<size_t>(ld_) * sizeof(double));
    std::memcpy(w1, block + ld_, static_cast<size_t>(ld_) * sizeof(double));
    KrylovResult result = {1, 1};
    int64_t next_check = options.first_check, applied = 0, first_done = 0, probe_until = 0,
            probed_ties = 1;
    for (;;) {
      expand(apply, limit, w0, w1);
      ++applied;
      const bool full = size_ == n_, capped = applied >= options.max_blocks;
      if (size_ == limit || size_ >= next_check || capped) {
        next_check = check_after(size_, options);
        const double before = result.error;
        result = assess(options, full);
        // Rounding may keep a very small tolerance out of reach.
        const bool stalled = result.error <= kStallError && result.error > before / 2;
        const bool converged = full || stalled || result.error <= options.tolerance;
        if (capped || full) break;
        if (converged && applied >= probe_until) {
          if (first_done == 0) first_done = applied;
          // A block of two sees at most two copies of an eigenvalue: look for more with fresh
          // columns.
          if (result.ties < 2 || result.ties <= probed_ties || result.ties == kMaxTies) break;
          probed_ties = result.ties;
          probe_until = applied + first_done;
          std::memset(w0, 0, static_cast<size_t>(2 * ld_) * sizeof(double));
        }
        if (size_ == limit) {
          rotate(limit / 2, basis_);
          restart(limit / 2);
          next_check = check_after(size_ - size_ / 4, options);
        }
      }
    }
    const double least = values_[size_ - 1];
    result.spread = least > 0 ? values_[0] / least : HUGE_VAL;
    const int64_t wanted = result.ties > 2 ? result.ties : 2;
    rotate(wanted < size_ ? wanted : size_, block);
    return result;
  }

 private:
  double* row(int64_t i) { return basis_ + i * ld_; }

  // Looking at the Ritz values costs size^3, a step size * n and the operator: small matrices look
  // less often.
  int64_t check_after(int64_t size, const KrylovOptions& options) const {
    const int64_t more = n_ < 256 ? 3 * size / 4 : size / 3, least = options.first_check / 2;
    return size + (more > least ? more : least);
  }

  // Appends the block w to the basis, applies the operator, and leaves the remainder in w.
  template <class Apply>
  void expand(const Apply& apply, int64_t limit, double* w0, double* w1) {
    const double tiny = 1e-14 * scale_;
    const int64_t first = size_;
    for (double* w : {w0, w1}) {
      if (size_ == limit) break;
      append_orthonormal(basis_, size_, n_, ld_, w, tiny, &column_);
      std::memcpy(row(size_++), w, static_cast<size_t>(ld_) * sizeof(double));
    }
    const int64_t last = size_ - 1;
    std::memcpy(w0, row(first), static_cast<size_t>(ld_) * sizeof(double));
    std::memcpy(w1, row(last), static_cast<size_t>(ld_) * sizeof(double));
    apply(w0, w1);
    for (int64_t i = 0; i < size_; ++i) {
      const double along0 = dot(row(i), w0, ld_), along1 = dot(row(i), w1, ld_);
      projected_[i][first] = projected_[first][i] = along0;
      projected_[i][last] = projected_[last][i] = along1;
      add_scaled(w0, -along0, row(i), ld_);
      add_scaled(w1, -along1, row(i), ld_);
    }
    remainder_[0][0] = dot(w0, w0, ld_);
    remainder_[1][1] = dot(w1, w1, ld_);
    remainder_[0][1] = dot(w0, w1, ld_);
    if (last == first) {
      remainder_[0][1] = remainder_[1][1] = 0;
      std::memset(w1, 0, static_cast<size_t>(ld_) * sizeof(double));
    }
    first_ = first;
    last_ = last;
  }

  // Ritz pairs of the current basis, their ties and the error estimate |r|^2 / gap, never above
  // |r|.
  KrylovResult assess(const KrylovOptions& options, bool full) {
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = 0; j < size_; ++j) scratch_[i * size_ + j] = projected_[i][j];
    }
    small_eigen(size_, scratch_, values_, vectors_, work_);
    scale_ = std::fabs(values_[0]);
    KrylovResult result = {0, 1};
    while (result.ties < size_ && result.ties < kMaxTies &&
           values_[result.ties] >= values_[0] - options.tie_gap * scale_) {
      ++result.ties;
    }
    if (full) return result;
    const double gap =
        result.ties < size_ ? (values_[0] - values_[result.ties]) / scale_ : options.tie_gap;
    for (int64_t i = 0; i < result.ties; ++i) {
      const double* y = vectors_ + i * size_;
      const double square = y[first_] * y[first_] * remainder_[0][0] +
                            y[last_] * y[last_] * remainder_[1][1] +
                            2 * y[first_] * y[last_] * remainder_[0][1];
      const double residual = square > 0 ? std::sqrt(square) / scale_ : 0;
      const double error = residual < gap ? residual * residual / gap : residual;
      if (!(error <= result.error)) result.error = error;
    }
    return result;
  }

  // target := the first `count` Ritz vectors; target may be the basis itself.
  void rotate(int64_t count, double* target) {
    constexpr int64_t kChunk = 8 * kWidth;
    double mixed[kMaxBasis][kChunk];
    for (int64_t j = 0; j < ld_; j += kChunk) {
      const int64_t width = ld_ - j < kChunk ? ld_ - j : kChunk;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < width; ++c) mixed[i][c] = 0;
        for (int64_t k = 0; k < size_; ++k) {
          const double weight = vectors_[i * size_ + k];
          const double* source = basis_ + k * ld_ + j;
          for (int64_t c = 0; c < width; ++c) mixed[i][c] += weight * source[c];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(target + i * ld_ + j, mixed[i], static_cast<size_t>(width) * sizeof(double));
      }
    }
  }

  void restart(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < count; ++j) projected_[i][j] = i == j ? values_[i] : 0;
    }
    size_ = count;
  }

  int64_t n_, ld_;
  double* basis_;
  int64_t size_ = 0, first_ = 0, last_ = 0;
  uint64_t column_ = 0;
  double scale_ = 0;
  double remainder_[2][2] = {};
  double projected_[kMaxBasis][kMaxBasis];
  double scratch_[kMaxBasis * kMaxBasis], vectors_[kMaxBasis * kMaxBasis];
  double values_[kMaxBasis], work_[3 * kMaxBasis];
};

// The classic baseline: one vector, one application a step. block as above; its second row becomes
// random.
template <class Apply>
KrylovResult power_iteration(const Apply& apply, int64_t n, int64_t ld,
                             const KrylovOptions& options, double* basis, double* block) {
  double *x = basis, *y = basis + ld, *unused = basis + 2 * ld;
  uint64_t column = 0;
  std::memcpy(x, block, static_cast<size_t>(ld) * sizeof(double));
  append_orthonormal(nullptr, 0, n, ld, x, 0, &column);
  KrylovResult result = {1, 1};
  double residual = 1;
  for (int64_t step = 0; step < options.max_blocks && result.error > options.tolerance; ++step) {
    std::memcpy(y, x, static_cast<size_t>(ld) * sizeof(double));
    std::memset(unused, 0, static_cast<size_t>(ld) * sizeof(double));
    apply(y, unused);
    const double value = dot(x, y, ld);
    add_scaled(x, -1 / value, y, ld);
    residual = std::sqrt(dot(x, x, ld));
    result.error = residual * residual;
    std::memcpy(x, y, static_cast<size_t>(ld) * sizeof(double));
    if (normalise(x, ld) == 0) break;
  }
  // The square stands for the error only once it is small; before, the residual itself does.
  if (result.error > options.tolerance) result.error = residual;
  std::memcpy(block, x, static_cast<size_t>(ld) * sizeof(double));
  if (n > 1) {
    std::memset(block + ld, 0, static_cast<size_t>(ld) * sizeof(double));
    append_orthonormal(block, 1, n, ld, block + ld, 0, &column);
  }
  return result;
}

}  // namespace tscnc::TSCNC_ISA
