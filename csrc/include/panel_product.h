// The kernel of the panel algorithm for a storage type on this CPU.
#pragma once

#include "cpu/masked_linear.h"
#include "cpu/masked_linear_bf16.h"

namespace tscnc {

template <class T>
struct PanelProduct {
  int64_t (*lanes)();
  int64_t (*scratch)(int64_t width);
  void (*run)(const MaskedProduct<T>& call, int64_t begin, int64_t end, Working<T>* scratch);
};

template <class T>
PanelProduct<T> panel_product() {
  return {TSCNC_SELECT(masked_linear_lanes<T>), TSCNC_SELECT(masked_linear_scratch<T>),
          TSCNC_SELECT(masked_linear_product<T>)};
}

#if defined(__x86_64__)
#define TSCNC_BF16_PRODUCT(isa)                                       \
  PanelProduct<bf16> {                                                \
    &isa::masked_linear_bf16_lanes, &isa::masked_linear_bf16_scratch, \
        &isa::masked_linear_bf16_product                              \
  }

template <>
inline PanelProduct<bf16> panel_product<bf16>() {
#if defined(TSCNC_WITH_WIDE)
  if (active_isa() == Isa::wide) return TSCNC_BF16_PRODUCT(wide);
#endif
#if !defined(TSCNC_EMULATE_AVX512)
  if (has_bf16_dots()) return TSCNC_BF16_PRODUCT(avx512_bf16);
#endif
  return {TSCNC_SELECT(masked_linear_lanes<bf16>), TSCNC_SELECT(masked_linear_scratch<bf16>),
          TSCNC_SELECT(masked_linear_product<bf16>)};
}
#undef TSCNC_BF16_PRODUCT
#endif

}  // namespace tscnc
