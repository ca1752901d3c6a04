// Singular values found by passes over the matrix alone, without a Gram matrix or a factor.
#pragma once

#include "extreme_singular_values.h"

namespace tscnc {

// fp64 elements of workspace.
TSCNC_PER_ISA(int64_t pass_workspace(const SpectralMatrix& matrix);)

// Both ends, or the largest alone, from the vectors of a matrix close to this one. False, with
// nothing of use written, where a few passes do not prove the promised warm errors: a square or
// badly conditioned matrix, tied values, a start too far away, a matrix of zeros or with NaN.
TSCNC_PER_ISA(bool warm_extremes(const SpectralMatrix& matrix, const SpectralOptions& options,
                                 const double* warm, int64_t warm_stride, double* workspace,
                                 SpectralResult* result);)

// sigma_max by as many passes as it needs. False where fp32 or fp64 squares leave the range and for
// matrices of zeros or with NaN.
TSCNC_PER_ISA(bool largest_by_passes(const SpectralMatrix& matrix, const SpectralOptions& options,
                                     const double* warm, int64_t warm_stride, double* workspace,
                                     SpectralResult* result);)

}  // namespace tscnc
