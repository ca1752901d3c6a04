#include "extreme_singular_values.h"

#include <limits>

#include "certificate.h"
#include "krylov.h"
#include "row_qr.h"
#include "tall_matrix.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Below this density scattered rank-1 updates beat the dense rank-k update.
constexpr double kSparseDensity = 0.25;
// The fp64 Gram matrix gives sigma_min to 1e-6 up to this condition number; beyond it A itself is factored.
constexpr double kGramCondition = 2e6;
// Error of a singular value that is promised; a larger estimate raises kCapReached.
constexpr double kPromisedError = 1e-3;
constexpr int64_t kMaxBlocks = 160;
constexpr int64_t kNullSteps = 3;

void zero(double* x, int64_t count) { std::memset(x, 0, static_cast<size_t>(count) * sizeof(double)); }

void copy(double* to, const double* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(double));
}

// The pieces of one workspace, laid out for a tall m x n matrix.
struct Workspace {
  int64_t ld, long_stride;
  double *gram, *factor, *panel, *packed, *basis, *block, *x, *z, *y, *null_space;
  SparseRows rows;
  int32_t* position;
  int64_t size;

  Workspace(const SpectralMatrix& a, double* base) {
    const int64_t m = a.kept_row_count > a.kept_col_count ? a.kept_row_count : a.kept_col_count;
    const int64_t n = a.kept_row_count + a.kept_col_count - m;
    const int64_t longest = a.rows > a.cols ? a.rows : a.cols;
    ld = padded_length(n);
    long_stride = (longest + 15) / 8 * 8;
    size = 0;
    const auto take = [&](int64_t count) {
      double* piece = base == nullptr ? nullptr : base + size;
      size += (count + 7) / 8 * 8;
      return piece;
    };
    gram = take(symmetric_size(n));
    factor = take(symmetric_size(n));
    panel = take(kPanelRows * ld);
    packed = take(kPanelRows * ld);
    basis = take((kMaxBasis + 2) * ld);
    block = take(2 * kMaxTies * ld);
    x = take(4 * ld);
    z = take(4 * ld);
    y = take(4 * long_stride);
    null_space = take((n - a.structural_rank + 2) * ld);
    rows.begin = reinterpret_cast<int64_t*>(take(m + 1));
    rows.column = reinterpret_cast<int32_t*>(take((a.nnz + 1) / 2));
    rows.value = take(a.nnz);
    position = reinterpret_cast<int32_t*>(take((a.rows + a.cols + 1) / 2));
  }
};

class Solver {
 public:
  Solver(const SpectralMatrix& source, const SpectralOptions& options, double* workspace,
         SpectralResult* result)
      : source_(source), options_(options), work_(source, workspace), out_(*result) {
    a_.source = &source_;
    a_.transposed = source.kept_row_count < source.kept_col_count;
    a_.m = a_.transposed ? source.kept_col_count : source.kept_row_count;
    a_.n = a_.transposed ? source.kept_row_count : source.kept_col_count;
    a_.long_kept = a_.transposed ? source.kept_cols : source.kept_rows;
    a_.short_kept = a_.transposed ? source.kept_rows : source.kept_cols;
    a_.scale = 1;
    a_.rows = work_.rows;
    a_.sparse = source.mask != nullptr &&
                static_cast<double>(source.nnz) <
                    kSparseDensity * static_cast<double>(a_.m) * static_cast<double>(a_.n);
  }

  void run(const double* warm, int64_t warm_stride) {
    clear_outputs();
    const int64_t n = a_.n;
    out_.rank = source_.want_full_rank ? n : source_.structural_rank;
    deficiency_ = n - source_.structural_rank;
    if (deficiency_ > 0) out_.flags |= kRankDeficient;
    if (n == 0) return finish_zero();
    load();
    double trace = 0;
    for (int64_t i = 0; i < n; ++i) trace += work_.gram[i * work_.ld + i];
    if (!std::isfinite(trace)) return finish_nan();
    if (trace == 0) return finish_zero();
    trace_ = trace;
    load_warm(warm, warm_stride);
    largest();
    smallest();
    close();
    judge();
    write_vectors();
    if (options_.certify) write_bounds();
    unscale();
  }

 private:
  double* block(int end) { return work_.block + end * kMaxTies * work_.ld; }

  void clear_outputs() {
    for (int end = 0; end < 2; ++end) {
      zero(out_.left[end], source_.rows);
      zero(out_.right[end], source_.cols);
      out_.ties[end] = 1;
      out_.residual[end] = 0;
    }
    const int64_t small = source_.rows < source_.cols ? source_.rows : source_.cols;
    for (int64_t i = 0; i < 2 * kMaxTies; ++i) zero(out_.block + i * out_.block_stride, small);
    out_.flags = 0;
  }

  void finish_zero() {
    const double inf = std::numeric_limits<double>::infinity();
    out_.flags |= kRankDeficient;
    out_.sigma[0] = out_.sigma[1] = 0;
    for (int i = 0; i < 4; ++i) out_.bounds[i] = 0;
    out_.bounds[4] = out_.bounds[5] = inf;
  }

  void finish_nan() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int end = 0; end < 2; ++end) {
      out_.sigma[end] = out_.residual[end] = nan;
      for (int64_t i = 0; i < source_.rows; ++i) out_.left[end][i] = nan;
      for (int64_t j = 0; j < source_.cols; ++j) out_.right[end][j] = nan;
    }
    for (double& bound : out_.bounds) bound = nan;
  }

  // Gram matrix of the small side; fp64 storage is scaled by a power of two so that no square leaves the range.
  void load() {
    if (source_.dtype == DType::float64) {
      double largest = 0;
      for (int64_t row = 0; row < a_.m; ++row) {
        load_rows_dense(row);
        for (int64_t j = 0; j < a_.n; ++j) {
          const double size = std::fabs(work_.panel[j]);
          if (!(size <= largest)) largest = size;
        }
      }
      if (largest > 0 && std::isfinite(largest)) a_.scale = std::ldexp(1.0, -std::ilogb(largest));
    }
    if (a_.sparse) {
      dispatch_dtype(source_.dtype, [&](auto* tag) {
        build_sparse_rows<std::remove_pointer_t<decltype(tag)>>(&a_, work_.position);
      });
    }
    gram(a_, work_.gram, work_.ld, work_.panel, work_.packed);
  }

  void load_rows_dense(int64_t row) {
    TallMatrix dense = a_;
    dense.sparse = false;
    load_rows(dense, row, 1, work_.panel, work_.ld);
  }

  // The stored state belongs to the stored matrix's small side; where removing rows or columns has turned the
  // matrix round, the start is cold.
  bool turned() const { return a_.transposed != (source_.rows < source_.cols); }

  void load_warm(const double* warm, int64_t stride) {
    zero(work_.block, 2 * kMaxTies * work_.ld);
    if (warm == nullptr || turned()) return;
    for (int i = 0; i < 4; ++i) {
      double* target = block(i / 2) + (i % 2) * work_.ld;
      for (int64_t j = 0; j < a_.n; ++j) target[j] = warm[i * stride + kept(a_.short_kept, j)];
    }
  }

  KrylovOptions krylov_options() const {
    // Small and fp64 matrices to rounding; elsewhere well inside the promised error.
    const bool tight = a_.n <= 64 || source_.dtype == DType::float64;
    const double close = 1 + options_.tie_tolerance;
    return {tight ? 1e-13 : 1e-6, 1 - 1 / (close * close), kMaxBlocks};
  }

  template <class Apply>
  void leading(int end, const Apply& apply) {
    KrylovResult result;
    if (options_.power) {
      result = power_iteration(apply, a_.n, work_.ld, krylov_options(), work_.basis, block(end));
    } else {
      KrylovSpace space(a_.n, work_.ld, work_.basis);
      result = space.run(apply, krylov_options(), block(end));
    }
    out_.ties[end] = result.ties;
    error_[end] = result.error / 2;
  }

  void largest() {
    leading(0, [&](double* w0, double* w1) {
      double *z0 = work_.z, *z1 = z0 + work_.ld;
      symmetric_multiply(work_.gram, work_.ld, a_.n, w0, w1, z0, z1);
      copy(w0, z0, work_.ld);
      copy(w1, z1, work_.ld);
    });
  }

  void apply_inverse(double* w0, double* w1) {
    project(w0);
    project(w1);
    solve_transposed(work_.factor, work_.ld, a_.n, w0, w1);
    solve_upper(work_.factor, work_.ld, a_.n, w0, w1);
    project(w0);
    project(w1);
  }

  // Removes the structural null space.
  void project(double* w) {
    for (int64_t i = 0; i < null_count_; ++i) {
      const double* row = work_.null_space + i * work_.ld;
      add_scaled(w, -dot(row, w, work_.ld), row, work_.ld);
    }
  }

  void smallest() {
    copy(work_.factor, work_.gram, symmetric_size(a_.n));
    if (deficiency_ > 0) {
      const double shift = 4 * kUnit * trace_;
      for (int64_t i = 0; i < a_.n; ++i) work_.factor[i * work_.ld + i] += shift;
      out_.flags |= kShifted;
    }
    if (!cholesky(work_.factor, work_.ld, a_.n, work_.packed)) refactor();
    if (deficiency_ > 0 && !source_.want_full_rank) find_null_space();
    smallest_vectors();
  }

  // Lanczos on the inverse, from a filtered start, with one closing inverse step.
  void smallest_vectors() {
    double *v0 = block(1), *v1 = v0 + work_.ld;
    uint64_t column = 1u << 10;
    for (double* v : {v0, v1}) {
      if (dot(v, v, work_.ld) > 0) continue;
      fill_random(v, a_.n, work_.ld, column++);
    }
    apply_inverse(v0, v1);
    leading(1, [&](double* w0, double* w1) { apply_inverse(w0, w1); });
    const int64_t available = a_.n - null_count_;
    int64_t count = out_.ties[1] > 2 ? out_.ties[1] : 2;
    if (count > available) count = available;
    for (int64_t i = 0; i < count; i += 2) {
      double *even = block(1) + i * work_.ld, *odd = even + work_.ld;
      if (i + 1 == count) zero(odd, work_.ld);
      apply_inverse(even, odd);
    }
    for (int64_t i = 0; i < count; ++i) {
      append_orthonormal(block(1), i, a_.n, work_.ld, block(1) + i * work_.ld, 0, &column);
    }
    if (count < 2) zero(v1, work_.ld);
  }

  // R from A itself, for matrices that the Gram matrix cannot resolve.
  void refactor() {
    out_.flags |= kRefactored;
    row_qr(a_, work_.factor, work_.ld, work_.panel, work_.packed);
    double largest = 0;
    for (int64_t i = 0; i < a_.n; ++i) {
      const double pivot = std::fabs(work_.factor[i * work_.ld + i]);
      if (pivot > largest) largest = pivot;
    }
    for (int64_t i = 0; i < a_.n; ++i) {
      double& pivot = work_.factor[i * work_.ld + i];
      if (std::fabs(pivot) > 0x1p-60 * largest) continue;
      pivot = 0x1p-60 * largest;
      out_.flags |= kShifted;
    }
  }

  // Block inverse iteration on the shifted Gram matrix: each step shrinks what is outside the null space by
  // shift / sigma_r^2.
  void find_null_space() {
    const int64_t ld = work_.ld, count = deficiency_;
    for (int64_t i = 0; i < count; ++i) {
      fill_random(work_.null_space + i * ld, a_.n, ld, (1u << 11) + i);
    }
    uint64_t column = 1u << 12;
    for (int64_t step = 0; step < kNullSteps; ++step) {
      zero(work_.null_space + count * ld, ld);
      for (int64_t i = 0; i < count; i += 2) {
        double *x0 = work_.null_space + i * ld, *x1 = x0 + ld;
        solve_transposed(work_.factor, ld, a_.n, x0, x1);
        solve_upper(work_.factor, ld, a_.n, x0, x1);
      }
      for (int64_t i = 0; i < count; ++i) {
        append_orthonormal(work_.null_space, i, a_.n, ld, work_.null_space + i * ld, 0, &column);
      }
    }
    null_count_ = count;
  }

  // Both ends in one pass over A: singular values as |Av|, the two vectors of each end rotated into each other's
  // optimum. Then the Gram matrix is given up where the condition number exceeds what it can resolve.
  void close() {
    measure();
    const bool beyond = out_.sigma[0] > kGramCondition * out_.sigma[1];
    if (!beyond || (out_.flags & kRefactored) != 0) return;
    if (deficiency_ > 0) {
      if (!source_.want_full_rank) out_.flags |= kCapReached;
      return;
    }
    refactor();
    smallest_vectors();
    measure();
  }

  void measure() {
    const int64_t ld = work_.ld, stride = work_.long_stride;
    copy(work_.x, block(0), 2 * ld);
    copy(work_.x + 2 * ld, block(1), 2 * ld);
    zero(work_.y, 4 * stride);
    multiply_both(a_, work_.x, work_.y, stride, work_.z, ld, work_.panel);
    for (int end = 0; end < 2; ++end) {
      if (a_.n > 1) rotate(end);
      double *x = work_.x + 2 * end * ld, *y = work_.y + 2 * end * stride;
      const double sigma = std::sqrt(dot(y, y, stride));
      out_.sigma[end] = sigma;
      copy(block(end), x, 2 * ld);
      double squares = 0;
      for (int64_t j = 0; j < a_.n; ++j) {
        const double r = sigma > 0 ? work_.z[2 * end * ld + j] / sigma - sigma * x[j] : 0;
        squares += r * r;
      }
      out_.residual[end] = std::sqrt(squares);
      if (sigma > 0) {
        for (int64_t i = 0; i < stride; ++i) y[i] /= sigma;
      }
    }
  }

  // One Jacobi rotation of the pair (x0, x1) that makes A x0 and A x1 orthogonal, the extreme one first.
  void rotate(int end) {
    const int64_t ld = work_.ld, stride = work_.long_stride;
    double *x = work_.x + 2 * end * ld, *y = work_.y + 2 * end * stride, *z = work_.z + 2 * end * ld;
    if (dot(x + ld, x + ld, ld) == 0) return;
    const double a = dot(y, y, stride), b = dot(y, y + stride, stride);
    const double c = dot(y + stride, y + stride, stride);
    double sine = 0, cosine = 1;
    if (b != 0) {
      const double tau = (c - a) / (2 * b);
      const double t = (tau >= 0 ? 1 : -1) / (std::fabs(tau) + std::sqrt(1 + tau * tau));
      cosine = 1 / std::sqrt(1 + t * t);
      sine = t * cosine;
    }
    const double first = a - (b != 0 ? sine / cosine * b : 0), second = a + c - first;
    const bool swap = end == 0 ? first < second : first > second;
    const auto turn = [&](double* p, double* q, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const double u = cosine * p[i] - sine * q[i], v = sine * p[i] + cosine * q[i];
        p[i] = swap ? v : u;
        q[i] = swap ? u : v;
      }
    };
    turn(x, x + ld, ld);
    turn(y, y + stride, stride);
    turn(z, z + ld, ld);
  }

  // Rank deficiency and whether the promised error holds.
  void judge() {
    const double floor = static_cast<double>(a_.m) * 2 * kUnit * out_.sigma[0];
    measured_ = out_.sigma[1];
    if ((source_.want_full_rank && deficiency_ > 0) || out_.sigma[1] <= floor) {
      out_.flags |= kRankDeficient;
      out_.sigma[1] = 0;
      error_[1] = 0;
    }
    if (error_[0] > kPromisedError || error_[1] > kPromisedError) out_.flags |= kCapReached;
  }

  void write_vectors() {
    for (int end = 0; end < 2; ++end) {
      const double* v = work_.x + 2 * end * work_.ld;
      const double* u = work_.y + 2 * end * work_.long_stride;
      double *small = a_.transposed ? out_.left[end] : out_.right[end];
      double *large = a_.transposed ? out_.right[end] : out_.left[end];
      const bool vanishes = out_.sigma[end] == 0;
      // Where sigma is 0 the left vector is 0; a null vector of the small side is given if that is the right.
      for (int64_t j = 0; j < a_.n; ++j) {
        small[kept(a_.short_kept, j)] = vanishes && a_.transposed ? 0 : v[j];
      }
      for (int64_t i = 0; i < a_.m; ++i) {
        large[kept(a_.long_kept, i)] = vanishes ? 0 : u[i];
      }
      write_block(end);
    }
  }

  // The tied vectors, at least two, on the stored matrix's small side.
  void write_block(int end) {
    int64_t count = out_.ties[end] > 2 ? out_.ties[end] : 2;
    if (count > a_.n) count = a_.n;
    double* target = out_.block + end * kMaxTies * out_.block_stride;
    for (int64_t first = 0; first < count; first += 4) {
      const int64_t some = count - first < 4 ? count - first : 4;
      const double* from = block(end) + first * work_.ld;
      int64_t stride = work_.ld, length = a_.n;
      const int64_t* list = a_.short_kept;
      if (turned()) {
        zero(work_.x, 4 * work_.ld);
        copy(work_.x, from, some * work_.ld);
        multiply_both(a_, work_.x, work_.y, work_.long_stride, work_.z, work_.ld, work_.panel);
        from = work_.y;
        stride = work_.long_stride;
        length = a_.m;
        list = a_.long_kept;
        for (int64_t q = 0; q < some; ++q) normalise(work_.y + q * stride, length);
      }
      for (int64_t q = 0; q < some; ++q) {
        for (int64_t j = 0; j < length; ++j) {
          target[(first + q) * out_.block_stride + kept(list, j)] = from[q * stride + j];
        }
      }
    }
  }

  void write_bounds() {
    const CertificateInput in = {work_.gram, work_.factor, work_.packed, a_.m, a_.n, work_.ld, trace_};
    const Interval most = certify_largest(in, out_.sigma[0]);
    Interval least;
    if (deficiency_ > 0 && source_.want_full_rank) {
      least = {0, 0};
    } else if (deficiency_ > 0) {
      // Beside an exact null space one vector bounds nothing from above.
      least = {0, most.upper};
    } else {
      least = certify_smallest(in, measured_);
    }
    const double inf = std::numeric_limits<double>::infinity();
    const Interval kappa = {least.upper > 0 ? most.lower / least.upper * (1 - 4 * kUnit) : inf,
                            least.lower > 0 ? most.upper / least.lower * (1 + 4 * kUnit) : inf};
    const Interval all[3] = {most, least, kappa};
    for (int i = 0; i < 3; ++i) {
      out_.bounds[2 * i] = all[i].lower;
      out_.bounds[2 * i + 1] = all[i].upper;
    }
  }

  void unscale() {
    for (int end = 0; end < 2; ++end) {
      out_.sigma[end] /= a_.scale;
      out_.residual[end] /= a_.scale;
    }
    for (int i = 0; i < 4; ++i) out_.bounds[i] /= a_.scale;
  }

  const SpectralMatrix& source_;
  const SpectralOptions& options_;
  Workspace work_;
  SpectralResult& out_;
  TallMatrix a_;
  int64_t deficiency_ = 0, null_count_ = 0;
  double trace_ = 0, measured_ = 0;
  double error_[2] = {};
};

}  // namespace

int64_t extreme_singular_values_workspace(const SpectralMatrix& matrix) {
  return Workspace(matrix, nullptr).size;
}

void extreme_singular_values(const SpectralMatrix& matrix, const SpectralOptions& options,
                             const double* warm, int64_t warm_stride, double* workspace,
                             SpectralResult* result) {
  Solver(matrix, options, workspace, result).run(warm, warm_stride);
}

}  // namespace tscnc::TSCNC_ISA
