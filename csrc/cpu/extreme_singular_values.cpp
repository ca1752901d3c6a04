#include "extreme_singular_values.h"

#include <limits>

#include "certificate.h"
#include "extreme_vectors.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Relative error of a singular value that is promised; a larger estimate raises kCapReached.
constexpr double kPromisedError = 1e-3;

// Solves one matrix and writes its result in the stored matrix's coordinates.
class Writer {
 public:
  Writer(const SpectralMatrix& source, const SpectralOptions& options, double* workspace,
         SpectralResult* result)
      : source_(source), options_(options), found_(source, options, workspace), out_(*result) {}

  void run(const double* warm, int64_t warm_stride) {
    clear();
    out_.rank = source_.want_full_rank ? found_.a.n : source_.structural_rank;
    if (found_.a.n == 0) return write_zero();
    found_.start_from(turned() ? nullptr : warm, warm_stride);
    const double trace = found_.load();
    if (!std::isfinite(trace)) return write_nan();
    if (trace == 0) return write_zero();
    found_.solve();
    judge();
    for (int end = 0; end < 2; ++end) write_vectors(end);
    for (int end = 0; end < 2; ++end) {
      write_block(end);
      out_.residual[end] = found_.residual[end] / found_.a.scale;
      out_.ties[end] = found_.ties[end];
    }
    if (options_.certify) write_bounds();
  }

 private:
  // The stored state belongs to the smaller side of the stored matrix. Where removing rows or
  // columns has made the other side the smaller one, the start is cold.
  bool turned() const { return found_.a.transposed != (source_.rows < source_.cols); }

  void clear() {
    for (int end = 0; end < 2; ++end) {
      zero(out_.left[end], source_.rows);
      zero(out_.right[end], source_.cols);
      out_.ties[end] = 1;
      out_.residual[end] = 0;
    }
    const int64_t smaller = source_.rows < source_.cols ? source_.rows : source_.cols;
    for (int64_t i = 0; i < 2 * kMaxTies; ++i) zero(out_.block + i * out_.block_stride, smaller);
    out_.flags = 0;
  }

  void write_zero() {
    out_.flags = kRankDeficient;
    out_.sigma[0] = out_.sigma[1] = 0;
    for (int i = 0; i < 4; ++i) out_.bounds[i] = 0;
    out_.bounds[4] = out_.bounds[5] = kInfinity;
  }

  void write_nan() {
    for (int end = 0; end < 2; ++end) {
      out_.sigma[end] = out_.residual[end] = kNaN;
      for (int64_t i = 0; i < source_.rows; ++i) out_.left[end][i] = kNaN;
      for (int64_t j = 0; j < source_.cols; ++j) out_.right[end][j] = kNaN;
    }
    for (double& bound : out_.bounds) bound = kNaN;
  }

  // Rank deficiency, and whether the promised error holds.
  void judge() {
    out_.flags = found_.flags;
    if (found_.deficiency > 0) out_.flags |= kRankDeficient;
    const bool impossible = source_.want_full_rank && found_.deficiency > 0;
    const double floor = static_cast<double>(found_.a.m) * 2 * kUnit * found_.sigma[0];
    for (int end = 0; end < 2; ++end) out_.sigma[end] = found_.sigma[end] / found_.a.scale;
    if (impossible || found_.sigma[1] <= floor) {
      out_.flags |= kRankDeficient;
      out_.sigma[1] = 0;
      found_.residual[1] = found_.sigma[1];
    } else if (found_.error[1] > kPromisedError) {
      out_.flags |= kCapReached;
    }
    if (found_.error[0] > kPromisedError) out_.flags |= kCapReached;
  }

  // Where sigma is 0 the left vector is 0, and the right one a null vector if its side is the
  // smaller.
  void write_vectors(int end) {
    const TallMatrix& a = found_.a;
    const double* v = found_.work.x + 2 * end * found_.work.ld;
    const double* u = found_.work.y + 2 * end * found_.work.long_stride;
    double* small = a.transposed ? out_.left[end] : out_.right[end];
    double* large = a.transposed ? out_.right[end] : out_.left[end];
    const bool vanishes = out_.sigma[end] == 0;
    if (!vanishes || !a.transposed) {
      for (int64_t j = 0; j < a.n; ++j) small[kept(a.short_kept, j)] = v[j];
    }
    if (!vanishes) {
      for (int64_t i = 0; i < a.m; ++i) large[kept(a.long_kept, i)] = u[i];
    }
  }

  // The tied vectors, at least two, on the smaller side of the stored matrix.
  void write_block(int end) {
    const TallMatrix& a = found_.a;
    ForwardWorkspace& work = found_.work;
    int64_t count = found_.ties[end] > 2 ? found_.ties[end] : 2;
    if (count > a.n) count = a.n;
    for (int64_t first = 0; first < count; first += 4) {
      const int64_t some = count - first < 4 ? count - first : 4;
      const double* from = found_.block(end) + first * work.ld;
      int64_t stride = work.ld, length = a.n;
      const int64_t* places = a.short_kept;
      if (turned()) {
        zero(work.x, 4 * work.ld);
        copy(work.x, from, some * work.ld);
        multiply_both(a, work.x, work.y, work.long_stride, work.z, work.ld, work.panel);
        from = work.y;
        stride = work.long_stride;
        length = a.m;
        places = a.long_kept;
        for (int64_t q = 0; q < some; ++q) normalise(work.y + q * stride, length);
      }
      for (int64_t q = 0; q < some; ++q) {
        double* target = out_.block + (end * kMaxTies + first + q) * out_.block_stride;
        for (int64_t j = 0; j < length; ++j) target[kept(places, j)] = from[q * stride + j];
      }
    }
  }

  void write_bounds() {
    const TallMatrix& a = found_.a;
    ForwardWorkspace& work = found_.work;
    const CertificateInput in = {work.gram, work.factor, work.packed, a.m,
                                 a.n,       work.ld,     found_.trace};
    const Interval most = certify_largest(in, found_.sigma[0]);
    Interval least = {0, 0};
    if (found_.deficiency == 0) {
      least = certify_smallest(in, found_.sigma[1]);
    } else if (!source_.want_full_rank) {
      // Beside a null space one vector bounds nothing from above.
      least.upper = most.upper;
    }
    const double ratio = least.upper > 0 ? most.lower / least.upper * (1 - 4 * kUnit) : kInfinity;
    const Interval kappa = {ratio > 1 ? ratio : 1, least.lower > 0
                                                       ? most.upper / least.lower * (1 + 4 * kUnit)
                                                       : kInfinity};
    const double values[6] = {most.lower / a.scale,  most.upper / a.scale, least.lower / a.scale,
                              least.upper / a.scale, kappa.lower,          kappa.upper};
    for (int i = 0; i < 6; ++i) out_.bounds[i] = values[i];
  }

  const SpectralMatrix& source_;
  const SpectralOptions& options_;
  ExtremeVectors found_;
  SpectralResult& out_;
};

void keep_state(const SpectralMatrix& a, SpectralResult* out) {
  const int64_t smaller = a.rows < a.cols ? a.rows : a.cols, stride = out->block_stride;
  for (int i = 0; i < 4; ++i) {
    copy(out->state + i * stride, out->block + (i / 2 * kMaxTies + i % 2) * stride, smaller);
  }
}

// Takes the smallest singular value, which was not asked for, back out of a result.
void forget_smallest(const SpectralMatrix& a, SpectralResult* out) {
  out->sigma[1] = out->residual[1] = 0;
  zero(out->left[1], a.rows);
  zero(out->right[1], a.cols);
  for (int64_t i = kMaxTies; i < 2 * kMaxTies; ++i) {
    zero(out->block + i * out->block_stride, a.rows < a.cols ? a.rows : a.cols);
  }
  out->ties[1] = 1;
}

}  // namespace

int64_t extreme_singular_values_workspace(const SpectralMatrix& matrix) {
  const int64_t forward = ForwardWorkspace(matrix, nullptr).size;
  const int64_t backward = BackwardWorkspace(matrix, nullptr).size;
  return forward > backward ? forward : backward;
}

void extreme_singular_values(const SpectralMatrix& matrix, const SpectralOptions& options,
                             const double* warm, int64_t warm_stride, double* workspace,
                             SpectralResult* result) {
  Writer(matrix, options, workspace, result).run(warm, warm_stride);
  if (options.largest_only) forget_smallest(matrix, result);
  keep_state(matrix, result);
}

}  // namespace tscnc::TSCNC_ISA
