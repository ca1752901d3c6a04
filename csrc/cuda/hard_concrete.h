// CUDA kernels of the hard concrete gates; see csrc/hard_concrete.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"

namespace tscnc::cuda {

// `count` contiguous entries of `dtype` in every array. `uniform` may be null: the test-time gate,
// with beta = 1 and no noise.
struct GateCall {
  const void* log_alpha;
  const void* uniform;
  int64_t count;
  DType dtype;
  double beta, gamma, zeta;
};

cudaError_t launch_hard_concrete(const GateCall& call, void* gates, cudaStream_t stream);

// gradient = grad_output * d gates / d log_alpha
cudaError_t launch_hard_concrete_backward(const GateCall& call, const void* grad_output,
                                          void* gradient, cudaStream_t stream);

}  // namespace tscnc::cuda
