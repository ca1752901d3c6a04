// Optimizer steps in place, on whole tensors or on the kept entries of dense weights.
#pragma once

#include <cstdint>

#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// One parameter with its gradient and state. Without a pattern (`pointers` null) all four hold the
// same entries. With one, the parameter and the gradient are dense matrices of `width` columns and
// the state holds the kept entries, row by row.
struct StepTensor {
  void* param;
  const void* grad;
  void* first;       // momentum buffer, or first moment; null without momentum
  void* second;      // second moment
  void* max_second;  // its running maximum, or null
  const int32_t* pointers;
  const int32_t* columns;
  int64_t width;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers hold nothing yet
};

struct AdamwOptions {
  double beta1, beta2, eps;
  double step_size;     // lr / (1 - beta1^t)
  double inverse_root;  // 1 / sqrt(1 - beta2^t)
  double decay;         // what the parameter is multiplied by: decoupled weight decay
  double l2;            // weight decay that joins the gradient
  bool maximize;
};

// Entries [begin, end) of a whole tensor, or rows [begin, end) of one with a pattern. T: float,
// double, bf16, fp16; half types are computed in float.
TSCNC_PER_ISA(template <class T>
              void masked_sgd_step(const StepTensor& tensor, const SgdOptions& options,
                                   int64_t begin, int64_t end);
              template <class T>
              void masked_adamw_step(const StepTensor& tensor, const AdamwOptions& options,
                                     int64_t begin, int64_t end);)

}  // namespace tscnc
