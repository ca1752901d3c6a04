// CUDA kernels that move the kept entries of a matrix; see csrc/sparsity_values.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"
#include "masked_linear.h"

namespace tscnc::cuda {

// values[j] = the matrix at kept entry j; the matrix has any strides.
cudaError_t launch_gather(const KeptEntries& entries, const void* matrix, int64_t row_stride,
                          int64_t column_stride, void* values, DType dtype, cudaStream_t stream);

// A contiguous matrix that holds the values at the kept entries and zero elsewhere.
cudaError_t launch_scatter(const KeptEntries& entries, const void* values, void* matrix,
                           DType dtype, cudaStream_t stream);

// output[i] = input[i] where bit i % 8 of bits[i / 8] is set, else zero, whatever input holds.
cudaError_t launch_mask(const void* input, const uint8_t* bits, int64_t count, void* output,
                        DType dtype, cudaStream_t stream);

}  // namespace tscnc::cuda
