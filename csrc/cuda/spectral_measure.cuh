// Singular values as |A v| on the matrix itself, which squares the error of v, and what brings the
// smallest vector nearer than the Gram matrix can.
#pragma once

#include "spectral_lanczos.cuh"

namespace tscnc::cuda {

// images[q] := A v, product[q] := A'A v for the four vectors of `pair`, of the matrix seen tall.
TSCNC_CALLED void multiply_both(const SpectralProblem& p, const SpectralJob& job, double scale) {
  constexpr int kVectors = 2 * kEnds;
  SpectralShared& shared = *p.shared;
  const int64_t m = larger_side(job);
  __syncthreads();
  if (job.rows < job.cols) {
    multiply_columns<kVectors>(job, scale, shared.pair[0], kSmallSide, p.images, m);
    __syncthreads();
    multiply_rows<kVectors>(job, scale, p.images, m, shared.product[0], kSmallSide);
  } else {
    multiply_rows<kVectors>(job, scale, shared.pair[0], kSmallSide, p.images, m);
    __syncthreads();
    multiply_columns<kVectors>(job, scale, p.images, m, shared.product[0], kSmallSide);
  }
  __syncthreads();
}

// The rotation of two vectors that makes their images orthogonal, the extreme one first.
struct Rotation {
  double cosine = 1, sine = 0;
  bool swaps = false;

  // From |A x0|^2, x0'A'A x1 and |A x1|^2.
  __device__ Rotation(int end, double p, double q, double r) {
    double tangent = 0;
    if (q != 0) {
      const double tau = (r - p) / (2 * q);
      tangent = (tau >= 0 ? 1 : -1) / (fabs(tau) + sqrt(1 + tau * tau));
    }
    cosine = 1 / sqrt(1 + tangent * tangent);
    sine = tangent * cosine;
    const double first = p - tangent * q, second = r + tangent * q;
    swaps = end == 0 ? first < second : first > second;
  }
  __device__ void turn(double* x, double* y) const {
    const double first = cosine * *x - sine * *y, second = sine * *x + cosine * *y;
    *x = swaps ? second : first;
    *y = swaps ? first : second;
  }
};

// The sums over the long side of the products of the two images of each end.
__device__ __forceinline__ void image_products(const SpectralProblem& p, int64_t m,
                                               double (&sums)[3]) {
  const double *y0 = p.images + 2 * p.end * m, *y1 = y0 + m;
  double parts[3] = {};
  for (int64_t i = p.element; i < m; i += kEndThreads) {
    parts[0] += y0[i] * y0[i];
    parts[1] += y0[i] * y1[i];
    parts[2] += y1[i] * y1[i];
  }
  for (int k = 0; k < 3; ++k) sums[k] = end_sum(p, parts[k]);
}

// What a pass over A says of both ends.
struct Measured {
  double sigma, second;  // |A v| of the pair
  double residual;       // |A'A v / sigma - sigma v|
};

// For the vectors in shared `pair`, which it turns.
TSCNC_CALLED Measured measure(const SpectralProblem& p, const SpectralJob& job, double scale,
                              bool has_second) {
  SpectralShared& shared = *p.shared;
  const int64_t m = larger_side(job);
  multiply_both(p, job, scale);
  double squares[3];
  image_products(p, m, squares);
  double *x = shared.pair[2 * p.end], *z = shared.product[2 * p.end], *y = p.images + 2 * p.end * m;
  if (has_second) {
    const Rotation rotation(p.end, squares[0], squares[1], squares[2]);
    if (p.has_element()) {
      rotation.turn(x + p.element, x + kSmallSide + p.element);
      rotation.turn(z + p.element, z + kSmallSide + p.element);
    }
    for (int64_t i = p.element; i < m; i += kEndThreads) rotation.turn(y + i, y + m + i);
  }
  __syncthreads();
  image_products(p, m, squares);
  const double sigma = sqrt(squares[0]), inverse = sigma > 0 ? 1 / sigma : 0;
  double r = 0;
  if (p.has_element()) r = z[p.element] * inverse - sigma * x[p.element];
  return {sigma, sqrt(squares[2]), sqrt(end_sum(p, r * r))};
}

// The correction by preconditioned inverse iteration of vector k of the smallest pair, with the
// inverted factor as the preconditioner; *square: the relative error of sigma^2 that it removes.
// The residual is A's own, so that the rounding of the Gram matrix does not stay in the vector.
__device__ __forceinline__ double correction(const SpectralProblem& p, int k, double sigma,
                                             double* square) {
  const SpectralShared& shared = *p.shared;
  double r = 0;
  if (p.end == 1 && p.has_element()) {
    r = shared.product[2 + k][p.element] - sigma * sigma * shared.pair[2 + k][p.element];
  }
  r = project(p, r, p.nulls(), 0);
  __syncthreads();
  const double w = project(p, apply(p, r), p.nulls(), 0);
  *square = end_sum(p, r * w) / (sigma * sigma);
  return p.end == 1 && p.has_element() ? w : 0;
}

// Improves the smallest pair until its estimated error is below the tolerance, three times at most.
// Returns the estimated relative error of sigma_min in the threads of end 1.
__device__ __forceinline__ double refine_smallest(const SpectralProblem& p, const SpectralJob& job,
                                                  double scale, bool has_second,
                                                  Measured* measured) {
  constexpr int kRounds = 3;
  SpectralShared& shared = *p.shared;
  for (int round = 0;; ++round) {
    double square, unused;
    const double first = correction(p, 0, measured->sigma, &square);
    const double ratio = measured->sigma / measured->second;
    const double gap = has_second ? fmax(1 - ratio * ratio, p.tie_gap) : 1;
    const bool is_close = p.end == 0 || square <= p.tolerance * gap;
    if (round == kRounds || __syncthreads_and(is_close)) return square / gap / 2;
    const double second = has_second ? correction(p, 1, measured->second, &unused) : 0;
    double* x = shared.pair[2];
    const bool is_smallest = p.end == 1;
    double v = is_smallest ? x[p.element] - first : 0;
    const double v_length = sqrt(end_sum(p, v * v));
    v = is_smallest ? v / v_length : 0;
    double u = is_smallest && has_second ? x[kSmallSide + p.element] - second : 0;
    const double along = end_sum(p, u * v);
    u -= along * v;
    const double u_length = sqrt(end_sum(p, u * u));
    if (is_smallest) {
      x[p.element] = v;
      x[kSmallSide + p.element] = has_second ? u / u_length : 0;
    }
    *measured = measure(p, job, scale, has_second);
  }
}

}  // namespace tscnc::cuda
