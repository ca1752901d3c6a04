// CUDA kernels of extreme_singular_values; formula: tscnc_kernels/ops/extreme_singular_values.py.
//
// No launcher waits for the GPU or reads device memory. Sums are in a fixed order, in double.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"

namespace tscnc::cuda {

// Largest smaller side of a matrix that one block holds.
constexpr int kSmallSide = 128;
// Largest number of tied singular vectors kept per end, as on the CPU.
constexpr int kTiedRows = 16;

// One contiguous row-major matrix, or its product with a mask. Device pointers.
struct SpectralJob {
  const void* data;
  const bool* mask;          // null: no pattern
  const int64_t* structure;  // of the pattern, as structural_rank returns it, or null
  int32_t rows, cols;
  DType dtype;
};

struct SpectralSettings {
  double tie_tolerance;
  bool structural, power, certify, largest_only;
};

// The outputs of the op, the vectors of all matrices side by side.
struct SpectralOutputs {
  double *sigma, *left, *right, *block, *state;
  int64_t* rank;
  double* residual;
  int64_t *flags, *ties;
  double* bounds;                      // null without certify
  int64_t count, rows, cols, smaller;  // matrices, and the sums of their sides
};

// Elements of double workspace.
int64_t extreme_singular_values_workspace(const SpectralJob* jobs, int64_t count);

// For matrices whose smaller side is at most kSmallSide, a block each. jobs: on the host. warm: the
// state of an earlier call, or null. settled: null, or the counters of the warm launch before,
// whose results are kept where it settled them.
cudaError_t launch_extreme_singular_values(const SpectralJob* jobs,
                                           const SpectralSettings& settings, const double* warm,
                                           const SpectralOutputs& outputs, double* workspace,
                                           const int32_t* settled, cudaStream_t stream);

// Counters of a matrix in a warm launch, and the one that is not 0 once the matrix needs no more.
constexpr int kWarmCounters = 20, kSettled = 19;

// Elements of double workspace of the warm launch.
int64_t warm_singular_values_workspace(const SpectralJob* jobs, int64_t count);

// For matrices of any size close to those whose state is `warm`, by passes over the matrices alone:
// everything in one launch. Neither power nor certify. What is not accepted stays for
// launch_extreme_singular_values up to kSmallSide, and keeps what was found beyond, with the flag
// that says so. counters: kWarmCounters per matrix, cleared here.
cudaError_t launch_warm_singular_values(const SpectralJob* jobs, const SpectralSettings& settings,
                                        const double* warm, const SpectralOutputs& outputs,
                                        double* workspace, int32_t* counters, cudaStream_t stream);

// What the forward call returned, and the gradient of its sigma, (2, count).
struct SpectralResults {
  const double *grad_sigma, *sigma, *left, *right, *block;
  const int64_t* ties;
  int64_t count, rows, cols, smaller;
};

int64_t extreme_singular_values_backward_workspace(const SpectralJob* jobs, int64_t count);

// For matrices of any size. gradients: one per matrix, in its dtype, zero off the mask.
cudaError_t launch_extreme_singular_values_backward(const SpectralJob* jobs,
                                                    const SpectralResults& results,
                                                    void* const* gradients, double* workspace,
                                                    cudaStream_t stream);

}  // namespace tscnc::cuda
