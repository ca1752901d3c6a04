// CUDA kernels of the optimizer steps; see csrc/masked_optimizer_cuda.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/dtype.h"
#include "../include/masked_optimizer.h"

namespace tscnc::cuda {

// A tensor to step, in device memory. The tensors of one launch must not share memory.
struct StepItem {
  StepTensor tensor;
  int64_t rows;   // of the pattern
  int64_t count;  // entries that are stepped
  DType dtype;
};

// Where AdamW's step counter of a tensor is: on the device, or else what it gives on the host.
struct StepCount {
  void* counter;  // device scalar to which one is added, or null
  bool is_double;
  double step_size, inverse_root;  // AdamwOptions of this step, if `counter` is null
};

// `items` is an array of the host. Nothing here synchronises with it.
cudaError_t launch_masked_sgd_step(const StepItem* items, int64_t count, const SgdOptions& options,
                                   cudaStream_t stream);

// One StepCount per item. workspace: device memory of 2 * count doubles; null if all counters are.
// `step_size` and `inverse_root` of the options are not read.
cudaError_t launch_masked_adamw_step(const StepItem* items, const StepCount* counts, int64_t count,
                                     double lr, const AdamwOptions& options, double* workspace,
                                     cudaStream_t stream);

}  // namespace tscnc::cuda
