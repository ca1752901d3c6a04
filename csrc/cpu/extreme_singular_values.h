// Extreme singular values of one matrix, and their gradient. Python side and formulas:
// tscnc_kernels/ops/extreme_singular_values.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// Largest number of tied singular vectors kept per end.
constexpr int64_t kMaxTies = 16;

enum SpectralFlag : int64_t {
  kRankDeficient = 1,
  kShifted = 2,
  kCapReached = 4,
  kRefactored = 8,
};

// One row-major matrix W, or W∘mask, restricted to the kept rows and columns.
struct SpectralMatrix {
  const void* data;
  DType dtype;
  int64_t rows, cols;
  const bool* mask;          // null: no pattern
  int64_t nnz;               // of the mask
  const int64_t* kept_rows;  // ascending, null: all
  const int64_t* kept_cols;
  int64_t kept_row_count, kept_col_count;
  int64_t structural_rank;  // of what is kept; min(kept counts) without a pattern
  bool want_full_rank;      // sigma_min at min(rows, cols) even where the pattern forbids that rank
  const int32_t* row_begin;     // compressed rows of the mask, rows + 1, or null
  const int32_t* entry_column;  // nnz
};

struct SpectralOptions {
  double tie_tolerance;
  bool power;  // power iteration in place of the Krylov spaces
  bool certify;
  bool largest_only;  // sigma_max; all that belongs to sigma_min comes back as zero
};

// Vectors span all rows or columns of W and are zero at the removed ones.
struct SpectralResult {
  double sigma[2];  // largest, smallest
  int64_t rank, flags;
  double residual[2];
  double bounds[6];      // lower and upper of sigma_max, sigma_min, kappa
  int64_t ties[2];       // tied vectors per end, at least 1
  double* left[2];       // (rows)
  double* right[2];      // (cols)
  double* block;         // (2 * kMaxTies, min(rows, cols)) tied vectors of the smaller side
  double* state;         // (4, min(rows, cols)), two vectors per end to start the next call from
  int64_t block_stride;  // of both
};

// fp64 elements of workspace for one matrix.
TSCNC_PER_ISA(int64_t extreme_singular_values_workspace(const SpectralMatrix& matrix);)

// By factorisations. warm: the state of an earlier call, four rows with stride warm_stride, or
// null.
TSCNC_PER_ISA(void extreme_singular_values(const SpectralMatrix& matrix,
                                           const SpectralOptions& options, const double* warm,
                                           int64_t warm_stride, double* workspace,
                                           SpectralResult* result);)

// gradient := sum over both ends of grad_sigma[end] * mean of u v' over the tied vectors, zero off
// the mask, in the matrix's dtype. Reads the result of the forward call.
TSCNC_PER_ISA(void extreme_singular_values_backward(const SpectralMatrix& matrix,
                                                    const SpectralResult& result,
                                                    const double* grad_sigma, double* workspace,
                                                    void* gradient);)

}  // namespace tscnc
