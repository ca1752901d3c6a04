// Singular values found by passes over the matrix alone, without a Gram matrix or a factor.
#pragma once

#include "extreme_singular_values.h"

namespace tscnc {

// fp64 elements of workspace.
TSCNC_PER_ISA(int64_t pass_workspace(const SpectralMatrix& matrix);)

// Where passes are enough: both ends, or the largest alone, from the vectors of a matrix close to
// this one, `warm` as for extreme_singular_values; the largest alone from any start. False, with
// nothing of use written, where a few passes do not prove the promised error: a square or badly
// conditioned matrix, tied values, a start too far away, squares that leave the lanes' range,
// zeros, NaN.
TSCNC_PER_ISA(bool solve_by_passes(const SpectralMatrix& matrix, const SpectralOptions& options,
                                   const double* warm, int64_t warm_stride, double* workspace,
                                   SpectralResult* result);)

}  // namespace tscnc
