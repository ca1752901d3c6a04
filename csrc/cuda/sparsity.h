// CUDA kernels that pack a mask and build the index of its kept entries; see
// csrc/sparsity_cuda.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tscnc::cuda {

// bits[i / 8] has bit i % 8 set where mask[i] is true, and zeros behind the last entry.
cudaError_t launch_pack_mask(const bool* mask, int64_t count, uint8_t* bits, cudaStream_t stream);

// The index of a packed rows x width mask, in device memory. Its attributes are those of
// SparsityPattern (tscnc_kernels/sparsity.py).
struct PatternIndex {
  const uint8_t* bits;
  int64_t rows, width;
  int32_t* row_pointers;     // (rows + 1,)
  int32_t* column_pointers;  // (width + 1,)
  int32_t* columns;          // these three (kept,)
  int32_t* column_rows;
  int32_t* permutation;
  int32_t* workspace;  // of `pattern_workspace_length`
};

int64_t pattern_workspace_length(int64_t rows, int64_t width);

// Counts: `kept` (a device scalar), the row pointers and the workspace. Nothing that has the length
// of the kept entries is touched. More of them than an int32 holds leave the row pointers useless.
cudaError_t launch_pattern_counts(const PatternIndex& index, int64_t* kept, cudaStream_t stream);

// Lists the entries, from what `launch_pattern_counts` left.
cudaError_t launch_pattern_lists(const PatternIndex& index, int64_t kept, cudaStream_t stream);

}  // namespace tscnc::cuda
