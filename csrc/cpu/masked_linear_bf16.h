// The panel algorithm of masked_linear in bfloat16 with AVX512_BF16's dot products of pairs
// (`vdpbf16ps`): panels of 16 bits, so that half as many bytes are read as in float, and two kept
// entries for every instruction.
//
// vdpbf16ps adds the two products one after the other to a float, each with one rounding to nearest
// even, whatever the thread's rounding mode is. It takes subnormal operands for zeros and flushes
// subnormal results. An incoming gradient that is scaled by gelu's derivative is rounded to
// bfloat16 once more than in the other instruction sets.
#pragma once

#include "masked_linear.h"

namespace tscnc {

#if defined(__x86_64__) && !defined(TSCNC_EMULATE_AVX512)
#define TSCNC_PER_BF16_ISA(...)                \
  TSCNC_IN_NAMESPACE(avx512_bf16, __VA_ARGS__) \
  TSCNC_PER_WIDE(__VA_ARGS__)
#elif defined(__x86_64__)
#define TSCNC_PER_BF16_ISA(...) TSCNC_PER_WIDE(__VA_ARGS__)
#else
#define TSCNC_PER_BF16_ISA(...)
#endif

// Whether the chosen instruction set has the dot products.
bool has_bf16_dots();

// As in masked_linear.h.
TSCNC_PER_BF16_ISA(int64_t masked_linear_bf16_lanes();)
TSCNC_PER_BF16_ISA(int64_t masked_linear_bf16_scratch(int64_t width);)
TSCNC_PER_BF16_ISA(void masked_linear_bf16_product(const MaskedProduct<bf16>& call, int64_t begin,
                                                   int64_t end, float* scratch);)

}  // namespace tscnc
