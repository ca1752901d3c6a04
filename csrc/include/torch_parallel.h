// torch's threads for the torch-free kernels that take a ParallelFor (csrc/cpu/parallel.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace tscnc {

inline void torch_parallel_for(int64_t count,
                               void (*body)(void* context, int64_t begin, int64_t end),
                               void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace tscnc
