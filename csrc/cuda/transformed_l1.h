// CUDA kernels of the transformed l1 penalty over a list of tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"

namespace tscnc::cuda {

// Number of doubles of workspace that `launch_transformed_l1` needs for these tensors.
int64_t transformed_l1_workspace_length(const int64_t* numels, int64_t count, DType dtype);

// The sum of rho_a(|t|) over all tensors and its gradient, in one pass over memory.
//
// inputs, grads: `count` device pointers to contiguous tensors of `dtype` with `numels` elements;
//   `grads` is null if only the value is wanted. The three arrays live on the host.
// value: device scalar, float (double if the tensors are double); null if only gradients are
// wanted. workspace: device memory of `transformed_l1_workspace_length` doubles; null if `value`
// is. grad_output: device scalar of the value's type that scales the gradients; null means 1.
//
// Nothing here synchronises with the host, and the result does not depend on scheduling: block
// sums are added up in a fixed order.
cudaError_t launch_transformed_l1(const void* const* inputs, void* const* grads,
                                  const int64_t* numels, int64_t count, DType dtype, double a,
                                  void* value, double* workspace, const void* grad_output,
                                  cudaStream_t stream);

}  // namespace tscnc::cuda
