// Both extreme singular values of many small matrices in one launch, a block per matrix.
//
// The Gram matrix of the small side, in double, stays in the cache; its Cholesky factor and that
// factor's inverse stay in shared memory. Vectors come from Lanczos at both ends, values from a
// pass over the matrix itself. Bound: chains of dependent steps, not bandwidth.
#include "extreme_singular_values.h"

#include "launch.cuh"
#include "spectral_bounds.cuh"
#include "spectral_measure.cuh"
#include "spectral_target.cuh"

namespace tscnc::cuda {

namespace {

// Beyond this condition number the Gram matrix does not resolve the smallest singular value.
constexpr double kGramCondition = 3e7;
constexpr int kNullSteps = 3;

__host__ __device__ int64_t workspace_of(const SpectralJob& job) {
  const int64_t n = smaller_side(job);
  // Gram matrix, two bases and a null space; four images. Larger ones are not this kernel's.
  return n > kSmallSide ? 0 : 4 * n * n + 4 * larger_side(job);
}

struct ForwardCall {
  SpectralSettings settings;
  SpectralOutputs out;
  const double* warm;
  double* workspace;
  const int32_t* settled;  // null, or a counter block per matrix
};

// Solves one matrix; every member is the same for all threads unless it says otherwise.
class Solver {
 public:
  __device__ Solver(const SpectralJob& job, const ForwardCall& call, const SpectralTarget& target,
                    SpectralShared* shared, double* factor)
      : job_(job), settings_(call.settings), call_(call), target_(target), m_(larger_side(job)) {
    const int64_t n = smaller_side(job);
    p_.shared = shared;
    p_.factor = factor;
    p_.n = int(n);
    p_.gram = call.workspace + target.place.workspace;
    p_.basis = p_.gram + n * n;
    p_.null_space = p_.basis + 2 * n * n;
    p_.images = p_.null_space + n * n;
    p_.found = target.block(0);
    p_.found_stride = target.out.smaller;
    p_.null_count = 0;
    p_.is_singular = false;
    p_.end = threadIdx.x / kEndThreads;
    p_.element = threadIdx.x % kEndThreads;
    const double close = 1 + settings_.tie_tolerance;
    p_.tie_gap = 1 - 1 / (close * close);
    // The square of the vectors' error: double to rounding, narrower types far inside the promise.
    p_.tolerance = job.dtype == DType::float64 ? 1e-21 : 1e-10;
  }

  __device__ void run() {
    target_.clear();
    const int64_t rank = read_structure();
    if (threadIdx.x == 0) target_.out.rank[target_.place.index] = rank;
    const double trace = load();
    if (!isfinite(trace)) return finish_degenerate(NAN, 0);
    if (trace == 0 || p_.live == 0) return finish_degenerate(0, kRankDeficient);
    if (wants_smallest()) factor(trace);
    find_vectors();
    measure_and_write();
    if (settings_.certify) {
      // Thread 0 has written both ends.
      __syncthreads();
      certify(p_, m_, trace, measured_[0], measured_[1], deficiency_, !settings_.structural, scale_,
              target_.out.bounds + 6 * target_.place.index);
    }
    target_.write_state();
  }

 private:
  __device__ bool wants_smallest() const { return !settings_.largest_only; }
  __device__ bool wanted() const { return p_.end == 0 || wants_smallest(); }

  __device__ void finish_degenerate(double value, int64_t flags) {
    target_.write_degenerate(value, flags, settings_.largest_only);
    target_.write_state();
  }

  // Live lines of the small side, and what the pattern takes away from them. Returns the rank whose
  // singular value is asked for.
  __device__ int64_t read_structure() {
    const bool removes = settings_.structural && job_.structure != nullptr;
    const bool wide = job_.rows < job_.cols;
    const int64_t* rows = job_.structure + 1;
    const int64_t *small = wide ? rows : rows + job_.rows, *large = wide ? rows + job_.rows : rows;
    if (p_.end == 0) {
      const bool is_live = p_.has_element() && (!removes || small[p_.element] != 0);
      p_.shared->is_live[p_.element] = is_live;
    }
    __syncthreads();
    p_.live = 0;
    for (int i = 0; i < p_.n; ++i) p_.live += p_.shared->is_live[i];
    int64_t others = removes ? 0 : m_;
    for (int64_t first = 0; first < m_ && removes; first += kSpectralThreads) {
      const int64_t i = first + threadIdx.x;
      others += __syncthreads_count(i < m_ && large[i] != 0);
    }
    int rank = p_.n;
    if (job_.structure != nullptr) rank = max(0, min(rank, int(job_.structure[0])));
    if (settings_.structural) rank = min(rank, p_.live);
    missing_ = p_.live - rank;
    deficiency_ = int(others < p_.live ? others : p_.live) - rank;
    return settings_.structural ? rank : p_.n;
  }

  // The Gram matrix; returns its trace. Double storage is scaled by a power of two so that no
  // square leaves the range.
  __device__ double load() {
    if (job_.dtype == DType::float64) {
      const double largest = largest_magnitude(job_, p_.shared->sums);
      if (largest > 0 && isfinite(largest)) scale_ = ldexp(1.0, -ilogb(largest));
    }
    form_gram(job_, scale_, reinterpret_cast<double (*)[kGramWidth]>(p_.factor), p_.gram);
    double trace = 0;
    for (int i = 0; i < p_.n; ++i) trace += p_.gram[i * p_.n + i];
    return trace;
  }

  // The inverse of the Cholesky factor of the Gram matrix, shifted where that is not definite.
  __device__ void factor(double trace) {
    double shift = missing_ > 0 ? 4 * kUnit * trace : 0;
    fill_factor(shift, trace);
    flags_ |= shift > 0 ? kShifted : 0;
    if (!cholesky(p_.factor, p_.n, 0)) {
      shift = 8 * p_.n * kUnit * trace;
      fill_factor(shift, trace);
      cholesky(p_.factor, p_.n, shift);
      flags_ |= kShifted;
      is_unresolved_ = true;
    }
    p_.is_singular = missing_ > 0 ? !settings_.structural : is_unresolved_;
    invert_triangle(p_.factor, p_.n);
    if (missing_ > 0 && settings_.structural) find_null_space();
  }

  // Dead lines are decoupled: their diagonal element becomes the trace.
  __device__ void fill_factor(double shift, double trace) {
    __syncthreads();
    for (int i = threadIdx.x; i < triangle_size(p_.n); i += kSpectralThreads) {
      const int row = triangle_row(i), col = i - triangle_size(row);
      const bool is_dead = row == col && !p_.shared->is_live[row];
      p_.factor[i] = is_dead ? trace : p_.gram[row * p_.n + col] + (row == col ? shift : 0);
    }
    __syncthreads();
  }

  // The structural null space by block inverse iteration on the shifted Gram matrix.
  __device__ void find_null_space() {
    uint64_t column = 1u << 11;
    double length;
    for (int step = 0; step < kNullSteps; ++step) {
      for (int i = 0; i < missing_; ++i) {
        double* row = p_.null_space + int64_t(i) * p_.n;
        double x = 0;
        if (p_.end == 1 && p_.has_element()) {
          x = step == 0 ? random_element(p_, column + uint64_t(i)) : row[p_.element];
        }
        __syncthreads();
        x = apply(p_, x);
        p_.null_count = i;
        uint64_t fresh = column + uint64_t(missing_ + i);
        x = orthonormalise(p_, x, i, 0, 0, p_.end == 1, &fresh, &length);
        if (p_.end == 1 && p_.has_element()) row[p_.element] = x;
        __syncthreads();
      }
    }
    p_.null_count = missing_;
  }

  __device__ void find_vectors() {
    double start[2] = {0, 0};
    for (int k = 0; k < 2 && call_.warm != nullptr && p_.has_element(); ++k) {
      const int64_t row = 2 * p_.end + k;
      const double element =
          call_.warm[row * target_.out.smaller + target_.place.smaller + p_.element];
      start[k] = p_.shared->is_live[p_.element] ? element : 0;
    }
    if (settings_.power) {
      find_leading_by_power(p_, start[0], wanted(), &error_);
      ties_ = 1;
    } else {
      ties_ = find_leading(p_, start, wanted(), &error_);
    }
    error_ /= 2;
  }

  __device__ void measure_and_write() {
    SpectralShared& shared = *p_.shared;
    const bool has_second = p_.live - p_.null_count > 1 || (p_.end == 0 && p_.live > 1);
    for (int k = 0; k < 2; ++k) {
      const bool is_set = p_.has_element() && wanted();
      shared.pair[2 * p_.end + k][p_.element] = is_set ? p_.found_row(p_.end, k)[p_.element] : 0;
    }
    Measured measured = measure(p_, job_, scale_, has_second && wanted());
    if (wants_smallest()) {
      const double error = refine_smallest(p_, job_, scale_, has_second, &measured);
      if (p_.end == 1) error_ = error;
    }
    if (p_.has_element() && wanted()) {
      for (int k = 0; k < 2; ++k) {
        p_.found_row(p_.end, k)[p_.element] = shared.pair[2 * p_.end + k][p_.element];
      }
    }
    judge(measured);
    write_vectors();
  }

  // Rank deficiency, and whether the promised error holds. The threads' own findings travel through
  // shared memory.
  __device__ void judge(const Measured& measured) {
    double* sums = p_.shared->sums;
    __syncthreads();
    if (p_.element == 0) {
      sums[p_.end] = measured.sigma;
      sums[2 + p_.end] = measured.residual;
      sums[4 + p_.end] = error_;
      sums[6 + p_.end] = ties_;
    }
    __syncthreads();
    double residual[2] = {sums[2], wants_smallest() ? sums[3] : 0};
    measured_[0] = sums[0];
    measured_[1] = wants_smallest() ? sums[1] : 0;
    const double* error = sums + 4;
    if (wants_smallest()) {
      const bool impossible = !settings_.structural && deficiency_ > 0;
      const double floor = double(m_) * 2 * kUnit * measured_[0];
      if (impossible || !(measured_[1] > floor)) {
        flags_ |= kRankDeficient;
        measured_[1] = residual[1] = 0;
      } else if (!(error[1] <= kPromisedError) || is_unresolved_ ||
                 measured_[0] > kGramCondition * measured_[1]) {
        flags_ |= kCapReached;
      }
      if (deficiency_ > 0) flags_ |= kRankDeficient;
    }
    if (!(error[0] <= kPromisedError)) flags_ |= kCapReached;
    if (threadIdx.x == 0) {
      for (int end = 0; end < kEnds; ++end) {
        const int ties = end == 0 || wants_smallest() ? int(sums[6 + end]) : 1;
        target_.write_end(end, measured_[end] / scale_, residual[end] / scale_, ties);
      }
      target_.out.flags[target_.place.index] = flags_;
    }
  }

  // Where sigma is 0 the left vector is 0, and the right one a null vector if its side is the
  // smaller.
  __device__ void write_vectors() {
    const bool wide = job_.rows < job_.cols;
    const double sigma = measured_[p_.end];
    double* small = wide ? target_.left(p_.end) : target_.right(p_.end);
    double* large = wide ? target_.right(p_.end) : target_.left(p_.end);
    if (!wanted()) return;
    if (p_.has_element() && (sigma > 0 || !wide)) {
      small[p_.element] = p_.shared->pair[2 * p_.end][p_.element];
    }
    const double* image = p_.images + 2 * p_.end * m_;
    for (int64_t i = p_.element; i < m_ && sigma > 0; i += kEndThreads) large[i] = image[i] / sigma;
  }

  const SpectralJob& job_;
  const SpectralSettings& settings_;
  const ForwardCall& call_;
  const SpectralTarget& target_;
  SpectralProblem p_;
  int64_t m_;
  double scale_ = 1;
  double measured_[kEnds];
  int missing_ = 0;     // dimensions that the pattern takes from the live small side
  int deficiency_ = 0;  // and from the smaller of both live sides
  int64_t flags_ = 0;
  bool is_unresolved_ = false;
  double error_ = 0;  // of this thread's end
  int ties_ = 1;
};

__global__ void __launch_bounds__(kSpectralThreads, 1)
    extreme_singular_values_kernel(const __grid_constant__ SpectralTable table,
                                   const __grid_constant__ ForwardCall call) {
  // All of it is dynamic: what is static would count against the default limit unseen.
  auto* shared = dynamic_shared<SpectralShared>();
  const int index = blockIdx.x;
  const SpectralPlace place = place_of(table, index, workspace_of);
  const SpectralJob& job = table.jobs[index];
  if (call.settled != nullptr && call.settled[place.index * kWarmCounters + kSettled] != 0) return;
  const SpectralTarget target = {call.out, place, job, call.settings.certify};
  Solver(job, call, target, shared, reinterpret_cast<double*>(shared + 1)).run();
}

// What the threads share, and the factor, whose place the panels of the Gram matrix take before.
size_t shared_bytes(const SpectralTable& table) {
  int64_t most = 0;
  for (int i = 0; i < table.count; ++i) {
    const int64_t n = smaller_side(table.jobs[i]);
    if (n <= kSmallSide) most = std::max(most, n);
  }
  const int64_t panel = kGramDepth * kGramWidth;
  const int64_t elements = std::max<int64_t>(triangle_size(int(most)), panel);
  return sizeof(SpectralShared) + sizeof(double) * size_t(elements);
}

}  // namespace

int64_t extreme_singular_values_workspace(const SpectralJob* jobs, int64_t count) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) size += workspace_of(jobs[i]);
  return size;
}

cudaError_t launch_extreme_singular_values(const SpectralJob* jobs,
                                           const SpectralSettings& settings, const double* warm,
                                           const SpectralOutputs& outputs, double* workspace,
                                           const int32_t* settled, cudaStream_t stream) {
  for (int64_t i = 0; i < outputs.count; ++i) {
    // What is larger must have been settled, which only the GPU can tell.
    if (smaller_side(jobs[i]) > kSmallSide && settled == nullptr) return cudaErrorInvalidValue;
  }
  const ForwardCall call = {settings, outputs, warm, workspace, settled};
  return for_each_table(jobs, outputs.count, workspace_of, [&](const SpectralTable& table) {
    return launch(extreme_singular_values_kernel, dim3(unsigned(table.count)),
                  dim3(kSpectralThreads), shared_bytes(table), stream, table, call);
  });
}

}  // namespace tscnc::cuda
