// Run-time choice between the builds of one kernel file for several CPU instruction sets.
#pragma once

#if defined(__x86_64__)
#define TSCNC_PER_ISA(...) \
  namespace portable {     \
  __VA_ARGS__              \
  }                        \
  namespace avx2 {         \
  __VA_ARGS__              \
  }                        \
  namespace avx512 {       \
  __VA_ARGS__              \
  }
#define TSCNC_SELECT(...)                                                           \
  ::tscnc::select_isa(&::tscnc::portable::__VA_ARGS__, &::tscnc::avx2::__VA_ARGS__, \
                      &::tscnc::avx512::__VA_ARGS__)
#else
#define TSCNC_PER_ISA(...) \
  namespace portable {     \
  __VA_ARGS__              \
  }
#define TSCNC_SELECT(...) (&::tscnc::portable::__VA_ARGS__)
#endif

namespace tscnc {

enum class Isa { portable, avx2, avx512 };

// The best instruction set of this CPU, lowered by TSCNC_ISA or set_isa().
Isa active_isa();

template <class Function>
Function select_isa(Function portable, Function avx2, Function avx512) {
  switch (active_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return portable;
  }
}

}  // namespace tscnc
