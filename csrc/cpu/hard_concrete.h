#pragma once

#include <cstdint>

#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// `uniform` may be null: the test-time gate, with beta = 1 and no noise. T: float, double, bf16,
// fp16.
TSCNC_PER_ISA(template <class T>
              void hard_concrete(const T* log_alpha, const T* uniform, T* gates, int64_t count,
                                 double beta, double gamma, double zeta);
              // gradient = grad_output * d gates / d log_alpha
              template <class T>
              void hard_concrete_backward(const T* grad_output, const T* log_alpha,
                                          const T* uniform, T* gradient, int64_t count, double beta,
                                          double gamma, double zeta);)

}  // namespace tscnc
