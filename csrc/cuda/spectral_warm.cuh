// Both ends of the spectrum, or the largest alone, in one Krylov space of A'A that grows by a pass
// over A at a time, as csrc/cpu/warm_extremes.cpp has it. Here: what one block does between two
// passes.
//
// A Ritz pair (theta, x) with residual r is off by at most |r|^2 / gap. The gap is estimated: it is
// measured to what else the space holds, less that one's own residual.
#pragma once

#include "spectral_target.cuh"
#include "spectral_warm_workspace.cuh"

namespace tscnc::cuda {

// Relative errors of sigma_max and sigma_min to stop at, as the bound has them.
__device__ __forceinline__ double warm_error(int end) { return end == 0 ? 1e-5 : 1e-3; }
// Largest ratio of the squared singular values: without a factor sigma_min converges no better than
// its gap relative to sigma_max^2.
constexpr double kWarmSpread = 900;
// What of the second vectors is random, so that a direction which the start lacks grows from call
// to call.
constexpr double kExploration = 1e-3;
// Below this side the space would not fit.
constexpr int kLeastWarmSide = 16;

// What the block that judges a pass has to say.
enum class Verdict { goes_on, declined, settled };

template <int kWanted>
class WarmSolver {
 public:
  static constexpr int kBlock = WarmSizes<kWanted>::kBlock;
  using Shared = WarmShared<kWanted>;

  __device__ WarmSolver(const SpectralJob& job, const SpectralSettings& settings,
                        const SpectralTarget& target, Shared* shared)
      : job_(job), settings_(settings), target_(target), at_(shared->at), s_(*shared) {
    n_ = smaller_side(job);
    const double close = 1 + settings.tie_tolerance;
    tie_gap_ = 1 - 1 / (close * close);
  }

  // The first block of the space; false for a matrix that passes cannot solve.
  TSCNC_CALLED bool start(const double* warm) {
    if (is_small() && (n_ < kLeastWarmSide || !is_whole())) return false;
    const double scale = kExploration * sqrt(3.0 / double(n_));
    for (int64_t i = threadIdx.x; i < n_ * kBlock; i += kSpectralThreads) {
      const int64_t j = i / kBlock, end = i % kBlock % kWanted, depth = i % kBlock / kWanted;
      double x = warm[(2 * end + depth) * target_.out.smaller + target_.place.smaller + j];
      x = isfinite(x) ? x : 0;
      if (depth == 1) x += scale * counter_uniform((1u << 13) + end, j);
      at_.basis[i] = is_live(j) ? x : 0;
    }
    return orthonormalise(0);
  }

  // After a pass, whose images are at_.images[pass].
  TSCNC_CALLED Verdict judge(int pass) {
    const int size = (pass + 1) * kBlock;
    project(pass);
    const bool is_finite = ritz_pairs(s_.ritz, size);
    if (!is_finite) return is_small() ? Verdict::declined : finish_degenerate(NAN, 0);
    // With random parts in the start, nothing but zeros maps all of it to zero.
    const double largest = s_.ritz.values[0];
    if (!(largest > 0))
      return is_small() ? Verdict::declined : finish_degenerate(0, kRankDeficient);
    choose_pairs(size);
    form_residuals(pass, size);
    const bool accepted = is_whole() && in_range(largest) && is_spread_small(size) && is_clear();
    if (!accepted) {
      const bool hopeless = !in_range(largest) || !is_spread_small(size);
      const bool is_last = pass + 1 == WarmSizes<kWanted>::passes(job_);
      if (is_small() && (hopeless || is_last)) return Verdict::declined;
      if (!is_last && orthonormalise(pass + 1)) {
        keep_vectors(size);
        return Verdict::goes_on;
      }
      if (is_small()) return Verdict::declined;
    }
    write(size, accepted);
    return Verdict::settled;
  }

  // The vectors of the long side from `begin` to `end`.
  TSCNC_CALLED void write_lines(int64_t begin, int64_t end, int size) const {
    const int64_t m = larger_side(job_);
    const bool wide = job_.rows < job_.cols;
    for (int e = 0; e < kEnds; ++e) {
      double* out = wide ? target_.right(e) : target_.left(e);
      const double sigma = target_.out.sigma[e * target_.out.count + target_.place.index];
      for (int64_t i = begin + threadIdx.x; i < end; i += kSpectralThreads) {
        double sum = 0;
        for (int k = 0; k < size && sigma > 0; ++k) {
          const double* lines = at_.lines + k / kBlock * m * kBlock;
          sum += at_.weights[e * kRitzRoom + k] * lines[i * kBlock + k % kBlock];
        }
        out[i] = sigma > 0 ? sum / sigma : is_wanted(e) ? sigma : 0;
      }
    }
  }

 private:
  __device__ bool is_small() const { return n_ <= kSmallSide; }
  __device__ static bool is_wanted(int end) { return end < kWanted; }

  // Without a null space that the pattern makes: sigma_min is that of the whole matrix.
  __device__ bool is_whole() const {
    return kWanted == 1 || job_.structure == nullptr || job_.structure[0] >= n_;
  }
  __device__ bool is_live(int64_t j) const {
    if (!settings_.structural || job_.structure == nullptr) return true;
    return job_.structure[1 + (job_.rows < job_.cols ? j : job_.rows + j)] != 0;
  }
  __device__ static bool in_range(double square) { return square > 1e-200 && square < 1e200; }

  // along := the products of `count` blocks of the basis from `first` on with another block.
  TSCNC_CALLED void multiply_blocks(int first, int count, const double* other) {
    constexpr int kProducts = kBlock * kBlock;
    static_assert(kSpectralWarps * (kRitzRoom + kBlock) <= kSpectralThreads, "parts are too few");
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    __syncthreads();
    for (int p = 0; p < count; ++p) {
      const double* block = at_.basis + (first + p) * n_ * kBlock;
      double sums[kProducts] = {};
      for (int64_t j = threadIdx.x; j < n_; j += kSpectralThreads) {
        double own[kBlock], others[kBlock];
        load_elements(block, j, own);
        load_elements(other, j, others);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
#pragma unroll
          for (int q = 0; q < kBlock; ++q) sums[i * kBlock + q] += own[i] * others[q];
        }
      }
      const double sum = fold_sum(sums);
      if (lane < kProducts) s_.parts[(warp * count + p) * kProducts + lane] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * kProducts; i += kSpectralThreads) {
      double sum = 0;
      for (int w = 0; w < kSpectralWarps; ++w) sum += s_.parts[w * count * kProducts + i];
      s_.along[i / kBlock][i % kBlock] = sum;
    }
    __syncthreads();
  }

  // The Cholesky factor of what block p has beyond those before. A column with too little of it is
  // to be replaced.
  TSCNC_CALLED void factor_rest(int p) {
    if (threadIdx.x < kBlock * kBlock) {
      const int q = threadIdx.x / kBlock, t = threadIdx.x % kBlock;
      double rest = s_.along[p * kBlock + q][t];
      for (int i = 0; i < p * kBlock; ++i) rest -= s_.along[i][q] * s_.along[i][t];
      s_.lower[q][t] = rest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      s_.failed = 0;
      for (int q = 0; q < kBlock; ++q) {
        for (int t = 0; t <= q; ++t) {
          double rest = s_.lower[q][t];
          for (int i = 0; i < t; ++i) rest -= s_.lower[q][i] * s_.lower[t][i];
          if (t < q) {
            s_.lower[q][t] = rest / s_.lower[t][t];
            continue;
          }
          const bool usable = rest > 1e-12 * s_.along[p * kBlock + q][q] && isfinite(rest);
          s_.lower[q][q] = usable ? sqrt(rest) : 1;
          s_.failed |= usable ? 0 : 1 << q;
        }
      }
    }
    __syncthreads();
  }

  // Makes block p of the basis orthonormal, to the blocks before it too: twice what would be enough
  // without rounding. False if random vectors do not help.
  TSCNC_CALLED bool orthonormalise(int p) {
    double* block = at_.basis + p * n_ * kBlock;
    int good = 0;
    for (int round = 0; round < 6 && good < 2; ++round) {
      multiply_blocks(0, p + 1, block);
      factor_rest(p);
      const int failed = s_.failed;
      for (int64_t j = threadIdx.x; j < n_; j += kSpectralThreads) {
        double x[kBlock];
#pragma unroll
        for (int q = 0; q < kBlock; ++q) {
          x[q] = block[j * kBlock + q];
          for (int i = 0; i < p * kBlock; ++i) x[q] -= basis(i, j) * s_.along[i][q];
#pragma unroll
          for (int t = 0; t < q; ++t) x[q] -= s_.lower[q][t] * x[t];
          x[q] /= s_.lower[q][q];
        }
#pragma unroll
        for (int q = 0; q < kBlock; ++q) {
          const uint64_t column = (1u << 14) + uint64_t((p * 8 + round) * kBlock + q);
          const double fresh = is_live(j) ? counter_uniform(column, uint64_t(j)) : 0;
          block[j * kBlock + q] = failed >> q & 1 ? fresh : x[q];
        }
      }
      good = failed == 0 ? good + 1 : 0;
    }
    __syncthreads();
    return good == 2;
  }

  __device__ double basis(int i, int64_t j) const {
    return at_.basis[(i / kBlock * n_ + j) * kBlock + i % kBlock];
  }
  __device__ double image(int i, int64_t j) const {
    return at_.images[(i / kBlock * n_ + j) * kBlock + i % kBlock];
  }

  // The operator in the space. In the coordinates of the last Ritz vectors, where it was diagonal,
  // the new block adds little more than rows and columns that its residuals have made small.
  TSCNC_CALLED void project(int pass) {
    const int before = pass * kBlock, size = before + kBlock;
    RitzShared& ritz = s_.ritz;
    multiply_blocks(0, pass + 1, at_.images + before * n_);
    for (int at = threadIdx.x; at < size * size; at += kSpectralThreads) {
      const int i = at / size, j = at % size;
      const bool is_old = i < before && j < before, is_new = i >= before && j >= before;
      ritz.vectors[i][j] = is_old ? at_.ritz_vectors[i * kRitzRoom + j] : i == j ? 1 : 0;
      if (is_old) ritz.operator_[i][j] = i == j ? at_.ritz_values[i] : 0;
      if (is_new) {
        ritz.operator_[i][j] = (s_.along[i][j - before] + s_.along[j][i - before]) / 2;
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < before * kBlock; at += kSpectralThreads) {
      const int j = at / kBlock, q = at % kBlock;
      double sum = 0;
      for (int i = 0; i < before; ++i) sum += ritz.vectors[i][j] * s_.along[i][q];
      ritz.operator_[j][before + q] = ritz.operator_[before + q][j] = sum;
    }
  }

  // Leaves the coordinates to the next pass.
  __device__ void keep_vectors(int size) {
    for (int at = threadIdx.x; at < size * size; at += kSpectralThreads) {
      const int i = at / size, j = at % size;
      at_.ritz_vectors[i * kRitzRoom + j] = s_.ritz.vectors[i][j];
      if (i == j) at_.ritz_values[i] = s_.ritz.operator_[i][i];
    }
  }

  __device__ double weight(int i, int k) const { return s_.ritz.vectors[i][s_.place[k]]; }

  // The two pairs of each end, the extreme one first.
  __device__ void choose_pairs(int size) {
    if (threadIdx.x < kBlock) {
      const int k = threadIdx.x, end = k % kWanted, depth = k / kWanted;
      const int from = end == 0 ? depth : size - 1 - depth;
      s_.value[k] = s_.ritz.values[from];
      s_.place[k] = s_.ritz.order[from];
    }
    __syncthreads();
  }

  // The residuals of the pairs, which become the next block: in exact arithmetic they span what
  // another product with the last block would add.
  TSCNC_CALLED void form_residuals(int pass, int size) {
    double* block = at_.basis + (pass + 1) * n_ * kBlock;
    for (int64_t j = threadIdx.x; j < n_; j += kSpectralThreads) {
      double sums[kBlock] = {};
      for (int i = 0; i < size; ++i) {
        const double x = basis(i, j), z = image(i, j);
#pragma unroll
        for (int q = 0; q < kBlock; ++q) sums[q] += weight(i, q) * (z - s_.value[q] * x);
      }
#pragma unroll
      for (int q = 0; q < kBlock; ++q) block[j * kBlock + q] = sums[q];
    }
    multiply_blocks(pass + 1, 1, block);
    if (threadIdx.x < kBlock) s_.residual[threadIdx.x] = sqrt(s_.along[threadIdx.x][threadIdx.x]);
    __syncthreads();
  }

  __device__ bool is_spread_small(int size) const {
    return kWanted == 1 || s_.ritz.values[size - 1] * kWarmSpread >= s_.ritz.values[0];
  }

  // Of the next value from the one of this end, and what counts as a tie.
  __device__ double distance(int end) const {
    return fabs(s_.value[end] - s_.value[end + kWanted]);
  }
  __device__ double tie(int end) const { return tie_gap_ * s_.value[end == 0 ? 0 : end + kWanted]; }

  // Whether the estimates prove the promised errors, with no tie.
  __device__ bool is_clear() const {
    for (int end = 0; end < kWanted; ++end) {
      const double gap = distance(end) - s_.residual[end + kWanted];
      if (!(gap > s_.residual[end] + tie(end))) return false;
      const double error = s_.residual[end] * s_.residual[end] / (gap * s_.value[end]) / 2;
      if (!(error <= warm_error(end))) return false;
    }
    return true;
  }

  // Whether the promised error is likely where it is not clear: by the residual alone among ties.
  __device__ bool is_likely() const {
    for (int end = 0; end < kWanted; ++end) {
      const double relative = s_.residual[end] / s_.value[end];
      const double gap = fmax(distance(end), tie(end)) / s_.value[end];
      if (!(fmin(relative * relative / gap, relative) / 2 <= kPromisedError)) return false;
    }
    return is_whole();
  }

  __device__ int64_t rank() const {
    const bool is_structural = settings_.structural && job_.structure != nullptr;
    return is_structural && job_.structure[0] < n_ ? job_.structure[0] : n_;
  }

  // Where sigma_max is wanted alone, zeros stand for the other end.
  TSCNC_CALLED Verdict finish_degenerate(double value, int64_t flags) {
    for (int end = 0; end < kEnds; ++end) {
      const double shown = is_wanted(end) ? value : 0;
      double* small = job_.rows < job_.cols ? target_.left(end) : target_.right(end);
      for (int64_t j = threadIdx.x; j < n_; j += kSpectralThreads) {
        // Every unit vector is a null vector of zeros.
        const bool is_null = value == 0 && job_.rows >= job_.cols && is_wanted(end);
        small[j] = is_null ? basis(end, j) : shown;
        for (int i = 0; i < kTiedRows; ++i) target_.block(end * kTiedRows + i)[j] = 0;
      }
      if (threadIdx.x == 0) target_.write_end(end, shown, shown, 1);
    }
    target_.write_state();
    write_facts(flags);
    return Verdict::settled;
  }

  __device__ void write_facts(int64_t flags) const {
    if (threadIdx.x != 0) return;
    target_.out.flags[target_.place.index] = flags;
    target_.out.rank[target_.place.index] = rank();
  }

  // The state is one step ahead of the pairs: A'A brings the largest out, sigma_max^2 - A'A the
  // smallest, and both images are at hand.
  TSCNC_CALLED void write(int size, bool accepted) {
    const int64_t stride = target_.out.smaller, first = target_.place.smaller;
    for (int64_t at = threadIdx.x; at < n_ * 2 * kEnds; at += kSpectralThreads) {
      const int64_t j = at % n_;
      const int end = int(at / n_) / 2, depth = int(at / n_) % 2, k = end + depth * kWanted;
      double x = 0, ahead = 0;
      if (is_wanted(end)) {
        double z = 0;
        for (int i = 0; i < size; ++i) {
          x += weight(i, k) * basis(i, j);
          z += weight(i, k) * image(i, j);
        }
        const double along = end == 0 ? s_.value[k] : s_.value[0] - s_.value[k];
        // The residual is orthogonal to x.
        const double length = hypot(along, s_.residual[k]);
        ahead = (end == 0 ? z : s_.value[0] * x - z) / (length > 0 ? length : 1);
      }
      target_.out.state[(2 * end + depth) * stride + first + j] = ahead;
      target_.block(end * kTiedRows + depth)[j] = x;
      for (int i = 2 + depth; i < kTiedRows; i += 2) target_.block(end * kTiedRows + i)[j] = 0;
      double* small = job_.rows < job_.cols ? target_.left(end) : target_.right(end);
      if (depth == 0) small[j] = x;
    }
    for (int at = threadIdx.x; at < kWanted * size; at += kSpectralThreads) {
      at_.weights[at / size * kRitzRoom + at % size] = weight(at % size, at / size);
    }
    if (threadIdx.x == 0) {
      for (int end = 0; end < kEnds; ++end) {
        const double sigma = is_wanted(end) && s_.value[end] > 0 ? sqrt(s_.value[end]) : 0;
        const double residual = sigma > 0 ? s_.residual[end] / sigma : 0;
        const bool is_tied = is_wanted(end) && distance(end) <= tie(end);
        target_.write_end(end, sigma, residual, is_tied ? 2 : 1);
      }
    }
    const bool is_kept = accepted || (is_spread_small(size) && is_likely());
    write_facts(is_kept ? 0 : kCapReached);
  }

  const SpectralJob& job_;
  const SpectralSettings& settings_;
  const SpectralTarget& target_;
  const WarmWorkspace<kWanted>& at_;
  Shared& s_;
  int64_t n_;
  double tie_gap_;
};

}  // namespace tscnc::cuda
