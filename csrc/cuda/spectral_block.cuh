// What the threads of a block share while they search both ends of one matrix at the same time:
// half of them per end, a thread per element of its vectors.
//
// End 0 has the operator G = A'A, end 1 its inverse from the inverted factor. Rows are kept
// orthonormal to: the structural null space (end 1), the vectors found before, the Krylov basis.
#pragma once

#include "spectral_factor.cuh"

namespace tscnc::cuda {

constexpr int kEnds = 2;
constexpr int kEndThreads = kSpectralThreads / kEnds;
constexpr int kEndWarps = kEndThreads / kWarpSize;
static_assert(kEndThreads == kSmallSide, "a thread per element of a vector");

struct alignas(16) SpectralShared {
  double vector[kEnds][kSmallSide];  // what the operators and the projection take
  double image[kSmallSide];          // between the two products of the inverse
  double along[kEnds][kSmallSide];
  double diagonal[kEnds][kSmallSide], coupling[kEnds][kSmallSide];  // of the projected operator
  double weights[kEnds][2][kSmallSide];  // of the two leading Ritz vectors in the basis
  double down[kEnds][2][kSmallSide], up[kEnds][2][kSmallSide];
  double second[kEnds][kSmallSide];                                    // the second Ritz vector
  double pair[2 * kEnds][kSmallSide], product[2 * kEnds][kSmallSide];  // v and A'A v, two per end
  double sums[kSpectralWarps];
  double value[kEnds], error[kEnds];  // of the leading Ritz pair
  int size[kEnds];                    // of the basis when the end was done
  int is_done[kEnds];
  unsigned char is_live[kSmallSide];
};

// One matrix, the same for every thread but for `end` and `element`.
struct SpectralProblem {
  SpectralShared* shared;
  double* factor;  // in shared memory, a triangle
  double *gram, *basis, *null_space, *images;
  double* found;  // (2 kTiedRows, stride), in the output
  int64_t found_stride;
  int n, live, null_count;
  int end, element;  // of this thread
  bool is_singular;  // the smallest values are not told from zero, so that none are tied
  double tie_gap, tolerance;

  __device__ bool has_element() const { return element < n; }
  __device__ int nulls() const { return end == 1 ? null_count : 0; }
  __device__ double* found_row(int of_end, int i) const {
    return found + (of_end * kTiedRows + i) * found_stride;
  }
  __device__ double* basis_row(int of_end, int i) const {
    return basis + (int64_t(of_end) * n + i) * n;
  }
  // Row i of those that this end's next vector is orthogonal to.
  __device__ const double* fixed_row(int i, int place) const {
    if (i < nulls()) return null_space + int64_t(i) * n;
    i -= nulls();
    return i < place ? found_row(end, i) : basis_row(end, i - place);
  }
};

// Pseudo-random in (-1, 1) from a counter (SplitMix64), as on the CPU.
__device__ __forceinline__ double counter_uniform(uint64_t column, uint64_t index) {
  uint64_t z = (column << 40) + index + 1;
  z *= 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return double(int64_t(z)) * 0x1p-63;
}

__device__ __forceinline__ double random_element(const SpectralProblem& p, uint64_t column) {
  const bool is_used = p.has_element() && p.shared->is_live[p.element];
  return is_used ? counter_uniform(column, uint64_t(p.element)) : 0;
}

// The sum over the threads of each end. Every thread of the block must call it.
TSCNC_CALLED double end_sum(const SpectralProblem& p, double value) {
  double* sums = p.shared->sums;
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kEndWarps; ++warp) total += sums[p.end * kEndWarps + warp];
  return total;
}

// The operator of each end times the vector whose elements the end's threads give.
TSCNC_CALLED double apply(const SpectralProblem& p, double x) {
  SpectralShared& shared = *p.shared;
  const int n = p.n, j = p.element;
  shared.vector[p.end][j] = x;
  __syncthreads();
  double sum = 0;
  if (p.has_element()) {
    if (p.end == 0) {
      const double* gram = p.gram;
#pragma unroll 8
      for (int i = 0; i < n; ++i) sum += gram[i * n + j] * shared.vector[0][i];
    } else {
      const double* row = triangle_line(p.factor, j);
#pragma unroll 4
      for (int i = 0; i <= j; ++i) sum += row[i] * shared.vector[1][i];
      shared.image[j] = sum;
    }
  }
  __syncthreads();
  if (p.end == 1 && p.has_element()) {
    sum = 0;
#pragma unroll 4
    for (int i = j; i < n; ++i) sum += triangle_line(p.factor, i)[j] * shared.image[i];
  }
  return sum;
}

// What is left of x without its parts along the first `count` fixed rows.
TSCNC_CALLED double project(const SpectralProblem& p, double x, int count, int place) {
  SpectralShared& shared = *p.shared;
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  shared.vector[p.end][p.element] = x;
  __syncthreads();
  for (int i = p.element / kWarpSize; i < count; i += kEndWarps) {
    const double* row = p.fixed_row(i, place);
    double sum = 0;
    for (int j = lane; j < p.n; j += kWarpSize) sum += row[j] * shared.vector[p.end][j];
    sum = warp_sum(sum);
    if (lane == 0) shared.along[p.end][i] = sum;
  }
  __syncthreads();
  for (int i = 0; i < count && p.has_element(); ++i) {
    x -= shared.along[p.end][i] * p.fixed_row(i, place)[p.element];
  }
  return x;
}

// x made orthogonal to `count` fixed rows and of length 1. Where less than `tiny` of it is left, a
// random vector takes its place, and *length, what was left, becomes 0. An end that is not wanted
// only keeps the other company.
TSCNC_CALLED double orthonormalise(const SpectralProblem& p, double x, int count, int place,
                                   double tiny, bool wanted, uint64_t* column, double* length) {
  for (int attempt = 0; attempt < 4; ++attempt) {
    x = project(p, x, wanted ? count : 0, place);
    const double first = sqrt(end_sum(p, x * x));
    bool usable = first > tiny && isfinite(first);
    x = usable ? x / first : 0;
    x = project(p, x, wanted ? count : 0, place);
    const double second = sqrt(end_sum(p, x * x));
    usable = usable && second > 0.5;
    if (usable) x /= second;
    if (attempt == 0) *length = usable ? first * second : 0;
    if (__syncthreads_and(usable || !wanted)) break;
    if (!usable) x = random_element(p, (*column)++);
    tiny = 1e-10;
  }
  return wanted ? x : 0;
}

}  // namespace tscnc::cuda
