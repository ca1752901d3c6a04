#pragma once

#include <cstdint>

#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// Sum over `count` elements of rho_a(|t|), or 0 where `want_value` is false; where `gradient` is
// not null it receives scale * d rho_a / dt. One pass over memory. T: float, double, bf16, fp16.
TSCNC_PER_ISA(template <class T> double transformed_l1(const T* input, T* gradient, int64_t count,
                                                       double a, double scale, bool want_value);)

}  // namespace tscnc
