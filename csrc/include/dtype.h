// Storage types that kernels are built for. The numbers are torch's own scalar type codes, so that
// a wrapper passes a tensor's code on unchanged.
#pragma once

#include <cstdint>

namespace tscnc {

enum class DType : int32_t { float16 = 5, float32 = 6, float64 = 7, bfloat16 = 15 };

}  // namespace tscnc
