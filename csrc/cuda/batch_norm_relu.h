// CUDA kernels of batch_norm_relu; formula: tscnc_kernels/ops/batch_norm_relu.py.
//
// Nothing here synchronises with the host. All sums are in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"

namespace tscnc::cuda {

// A contiguous (outer, channels, length) tensor, and the affine map of its channels.
struct BatchNormCall {
  int64_t outer, channels, length;
  DType dtype;
  double eps;
  bool relu;
  const double* weight;  // (channels,), or null for 1
  const double* bias;    // or null for 0
};

int64_t batch_norm_workspace(const BatchNormCall& call);

// `mean` and `variance`, (channels,), are read if `is_given`, else the batch's are written.
cudaError_t launch_batch_norm(const BatchNormCall& call, const void* input, bool is_given,
                              double* mean, double* variance, void* output, void* workspace,
                              cudaStream_t stream);

// `grad_input`, or `grad_weight` and `grad_bias` of (channels,) doubles, may be null. In training
// the gradient of the input passes through the statistics, too.
cudaError_t launch_batch_norm_backward(const BatchNormCall& call, const void* grad_output,
                                       const void* input, const double* mean,
                                       const double* variance, bool training, void* grad_input,
                                       double* grad_weight, double* grad_bias, void* workspace,
                                       cudaStream_t stream);

}  // namespace tscnc::cuda
