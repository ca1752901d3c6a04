// Leading eigenvectors of both operators by Lanczos with full reorthogonalisation, one vector after
// the other: each run is kept orthogonal to the vectors found before, so that it sees the further
// copies of a repeated eigenvalue. A basis holds up to n vectors and is never restarted.
#pragma once

#include "spectral_block.cuh"

namespace tscnc::cuda {

// Of T, the tridiagonal matrix of `size` diagonal and off-diagonal elements.
struct Tridiagonal {
  const double *diagonal, *coupling;
  int size;

  // How many eigenvalues are at least x.
  __device__ int count_from(double x, double tiny) const {
    int count = 0;
    double pivot = 1;
    for (int i = 0; i < size; ++i) {
      const double below = i > 0 ? coupling[i - 1] : 0;
      pivot = (diagonal[i] - x) - below * below / pivot;
      if (fabs(pivot) < tiny) pivot = tiny;
      count += pivot > 0;
    }
    return count;
  }
};

// The largest (first half of the warp) and the second largest eigenvalue (second half) by
// multisection, a shift per lane; not negative.
__device__ __forceinline__ double leading_value(const Tridiagonal& t, double bound) {
  constexpr int kShifts = kWarpSize / 2;
  const int lane = threadIdx.x % kWarpSize, half = lane / kShifts;
  const double tiny = 0x1p-1000 + 0x1p-100 * bound;
  double low = 0, high = bound;
  for (int sweep = 0; sweep < 16 && __any_sync(0xffffffffu, high - low > 0x1p-52 * high); ++sweep) {
    const double step = (high - low) / (kShifts + 1);
    const double shift = low + step * (lane % kShifts + 1);
    const unsigned reached = __ballot_sync(0xffffffffu, t.count_from(shift, tiny) > half);
    const int steps = __popc(reached >> (half * kShifts) & 0xffffu);
    high = low + step * (steps + 1);
    low += step * steps;
  }
  return low + (high - low) / 2;
}

// The eigenvector of T at `value`, of length 1, by one lane: one step of inverse iteration from the
// best unit vector, where the factorisations from both ends meet (Dhillon & Parlett 2004).
__device__ __forceinline__ void twisted_vector(const Tridiagonal& t, double value, double tiny,
                                               double* down, double* up, double* z) {
  const int last = t.size - 1;
  for (int i = 0; i <= last; ++i) {
    const double square = i > 0 ? t.coupling[i - 1] * t.coupling[i - 1] / down[i - 1] : 0;
    const double pivot = (t.diagonal[i] - value) - square;
    down[i] = fabs(pivot) < tiny ? -tiny : pivot;
  }
  int twist = 0;
  double least = INFINITY;
  for (int i = last; i >= 0; --i) {
    const double square = i < last ? t.coupling[i] * t.coupling[i] / up[i + 1] : 0;
    const double pivot = (t.diagonal[i] - value) - square;
    up[i] = fabs(pivot) < tiny ? -tiny : pivot;
    const double meeting = fabs(down[i] + up[i] - (t.diagonal[i] - value));
    if (meeting < least) least = meeting, twist = i;
  }
  double squares = 1;
  z[twist] = 1;
  for (int i = twist; i > 0; --i) {
    z[i - 1] = -t.coupling[i - 1] / down[i - 1] * z[i];
    squares += z[i - 1] * z[i - 1];
  }
  for (int i = twist; i < last; ++i) {
    z[i + 1] = -t.coupling[i] / up[i + 1] * z[i];
    squares += z[i + 1] * z[i + 1];
  }
  const double inverse = 1 / sqrt(squares);
  for (int i = 0; i <= last; ++i) z[i] *= inverse;
}

// What stops a run of one end.
struct LanczosGoal {
  int place;
  double leading;  // the largest eigenvalue found before
  bool is_exhausted, may_converge;
};

// By the first warp of an end: its Ritz pairs, their error, and whether that is small enough.
TSCNC_CALLED void assess(const SpectralProblem& p, const LanczosGoal& goal, int size) {
  SpectralShared& shared = *p.shared;
  const Tridiagonal t{shared.diagonal[p.end], shared.coupling[p.end], size};
  const int lane = threadIdx.x % kWarpSize, half = lane / (kWarpSize / 2);
  double bound = 0;
  for (int i = 0; i < size; ++i) {
    const double row = t.diagonal[i] + (i > 0 ? t.coupling[i - 1] : 0) + t.coupling[i];
    bound = fmax(bound, row);
  }
  bound *= 1 + 0x1p-40;
  const double value = leading_value(t, bound);
  const double tiny = 0x1p-1000 + 0x1p-100 * bound;
  if (lane % (kWarpSize / 2) == 0 && half < size) {
    twisted_vector(t, value, tiny, shared.down[p.end][half], shared.up[p.end][half],
                   shared.weights[p.end][half]);
  }
  const double first = __shfl_sync(0xffffffffu, value, 0);
  const double second = __shfl_sync(0xffffffffu, value, kWarpSize / 2);
  __syncwarp();
  if (lane != 0) return;
  const double residual =
      goal.is_exhausted ? 0 : fabs(t.coupling[size - 1] * shared.weights[p.end][0][size - 1]);
  const double apart = size > 1 ? (first - second) / first : p.tie_gap;
  const double gap = fmax(apart, p.tie_gap), rest = residual / first;
  const double error = rest < gap ? rest * rest / gap : rest;
  // A further vector is of interest only if its eigenvalue is tied with the leading one.
  const bool is_apart = goal.place > 0 && first + residual < goal.leading * (1 - p.tie_gap);
  shared.value[p.end] = first;
  shared.error[p.end] = error;
  shared.size[p.end] = size;
  shared.is_done[p.end] = goal.is_exhausted || (goal.may_converge && (error <= p.tolerance)) ||
                          (goal.may_converge && is_apart);
}

// The found vector number `place` of each end that is wanted, from the basis and its weights.
__device__ __forceinline__ void write_ritz_vectors(const SpectralProblem& p, int place,
                                                   bool wanted) {
  SpectralShared& shared = *p.shared;
  double first = 0, second = 0;
  const int size = wanted ? shared.size[p.end] : 0;
  for (int i = 0; i < size && p.has_element(); ++i) {
    const double element = p.basis_row(p.end, i)[p.element];
    first += shared.weights[p.end][0][i] * element;
    if (size > 1) second += shared.weights[p.end][1][i] * element;
  }
  const double length = sqrt(end_sum(p, first * first));
  if (!wanted) return;
  if (p.has_element()) p.found_row(p.end, place)[p.element] = first / length;
  shared.second[p.end][p.element] = second;
}

// One run for the ends that are wanted, from the vectors whose elements the threads give. Leaves
// the eigenvalue and its estimated relative error in shared memory.
TSCNC_CALLED void lanczos(const SpectralProblem& p, int place, double start, double leading,
                          bool wanted) {
  constexpr int kFirstCheck = 8, kFresh = 6;
  SpectralShared& shared = *p.shared;
  const int room = p.live - p.nulls() - place;
  uint64_t column = (1u << 10) + 64 * uint64_t(place) + 4096 * uint64_t(p.end);
  double length = 0, scale = 0;
  int fresh_at = 0, fresh_count = 0;
  __syncthreads();
  if (p.element == 0) shared.is_done[p.end] = !wanted;
  double q = orthonormalise(p, start, p.nulls() + place, place, 0, wanted, &column, &length);
  for (int size = 0, next_check = kFirstCheck;;) {
    const bool is_active = !shared.is_done[p.end];
    if (is_active && p.has_element()) p.basis_row(p.end, size)[p.element] = q;
    const double image = apply(p, q);
    const double along = end_sum(p, q * image);
    scale = fmax(scale, along);
    ++size;
    const bool is_exhausted = is_active && size >= room, goes_on = is_active && !is_exhausted;
    q = orthonormalise(p, image, p.nulls() + place + size, place, 1e-13 * scale, goes_on, &column,
                       &length);
    if (goes_on && length == 0) fresh_at = size, ++fresh_count;
    if (is_active && p.element == 0) {
      shared.diagonal[p.end][size - 1] = along;
      shared.coupling[p.end][size - 1] = goes_on ? length : 0;
    }
    if (!__syncthreads_or(is_exhausted) && size < next_check) continue;
    if (size >= next_check) next_check += max(4, size / 2);
    if (is_active && p.element < kWarpSize) {
      // A basis that has broken down often has met many random vectors by then.
      const bool may_converge =
          size >= kFirstCheck && (size - fresh_at >= kFresh || fresh_count >= kFresh);
      assess(p, {place, leading, is_exhausted, may_converge}, size);
    }
    __syncthreads();
    if (shared.is_done[0] && shared.is_done[1]) break;
  }
  write_ritz_vectors(p, place, wanted);
  __syncthreads();
}

// All leading vectors that are tied, at least two where there is room. start: the threads' elements
// of the vectors to start from. Returns how many of this end are tied; error: of the leading one.
__device__ __forceinline__ int find_leading(const SpectralProblem& p, const double (&start)[2],
                                            bool wanted, double* error) {
  const SpectralShared& shared = *p.shared;
  const uint64_t column = (1u << 13) + uint64_t(p.end);
  const bool is_warm = end_sum(p, start[0] * start[0]) > 0;
  lanczos(p, 0, is_warm ? start[0] : random_element(p, column), 0, wanted);
  const double leading = shared.value[p.end];
  *error = shared.error[p.end];
  int ties = 1;
  bool is_open = wanted;
  for (int place = 1; place < kTiedRows; ++place) {
    const bool is_counted = place == 1 || p.end == 0 || !p.is_singular;
    is_open = is_open && is_counted && place < p.live - p.nulls();
    if (!__syncthreads_or(is_open)) break;
    // Something random in it finds a copy of the eigenvalue that the last basis could not see.
    double from = 0.1 * random_element(p, column + 16 * uint64_t(place));
    from += place == 1 && is_warm ? start[1] : shared.second[p.end][p.element];
    lanczos(p, place, from, leading, is_open);
    const double apart = fabs(shared.value[p.end] - leading);
    is_open = is_open && apart <= p.tie_gap * leading;
    if (is_open) ties = place + 1;
  }
  return ties;
}

// The classic baseline: one application a step, and no second vector but a random one.
__device__ __forceinline__ void find_leading_by_power(const SpectralProblem& p, double start,
                                                      bool wanted, double* error) {
  constexpr int kSteps = 160;
  uint64_t column = 1u << 14;
  double length = 0;
  double x = orthonormalise(p, start, p.nulls(), 0, 0, wanted, &column, &length);
  double found = 1, residual = 1;
  bool is_open = wanted;
  for (int step = 0; step < kSteps && __syncthreads_or(is_open); ++step) {
    const double y = project(p, apply(p, x), p.nulls(), 0);
    const double value = end_sum(p, x * y), norm = sqrt(end_sum(p, y * y));
    const double r = value > 0 ? x - y / value : 0;
    const double rest = sqrt(end_sum(p, r * r));
    if (is_open) {
      residual = rest;
      found = rest * rest;
      if (norm > 0) x = y / norm;
      is_open = !(found <= p.tolerance);
    }
  }
  // The square stands for the error only once it is small; before, the residual itself does.
  *error = is_open ? residual : found;
  if (wanted && p.has_element()) p.found_row(p.end, 0)[p.element] = x;
  __syncthreads();
  const bool has_second = wanted && p.live - p.nulls() > 1;
  x = orthonormalise(p, random_element(p, column++), p.nulls() + 1, 1, 0, has_second, &column,
                     &length);
  if (has_second && p.has_element()) p.found_row(p.end, 1)[p.element] = x;
  __syncthreads();
}

}  // namespace tscnc::cuda
