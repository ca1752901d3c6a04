// Optimizer steps in place, on whole tensors or on the kept entries of dense weights.
#pragma once

#include <cstdint>

#include "include/masked_optimizer.h"
#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// Entries [begin, end) of a whole tensor, or rows [begin, end) of one with a pattern. T: float,
// double, bf16, fp16; half types are computed in float.
TSCNC_PER_ISA(template <class T>
              void masked_sgd_step(const StepTensor& tensor, const SgdOptions& options,
                                   int64_t begin, int64_t end);
              template <class T>
              void masked_adamw_step(const StepTensor& tensor, const AdamwOptions& options,
                                     int64_t begin, int64_t end);)

}  // namespace tscnc
