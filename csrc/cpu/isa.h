// Run-time choice between the builds of one kernel file for several CPU instruction sets.
//
// Development builds add `wide`: the code of AVX-512, its intrinsics included, made of AVX2
// instructions, so that tests run it on machines without AVX-512. A sanitized build compiles it in
// AVX-512's place (TSCNC_EMULATE_AVX512).
#pragma once

#define TSCNC_IN_NAMESPACE(name, ...) \
  namespace name {                    \
  __VA_ARGS__                         \
  }

#if !defined(__x86_64__)
#define TSCNC_PER_ISA(...) TSCNC_IN_NAMESPACE(portable, __VA_ARGS__)
#define TSCNC_SELECT(...) (&::tscnc::portable::__VA_ARGS__)
#else
#if defined(TSCNC_WITH_WIDE)
#define TSCNC_PER_WIDE(...) TSCNC_IN_NAMESPACE(wide, __VA_ARGS__)
#define TSCNC_WIDE_OR_AVX2(...) &::tscnc::wide::__VA_ARGS__
#else
#define TSCNC_PER_WIDE(...)
#define TSCNC_WIDE_OR_AVX2(...) &::tscnc::avx2::__VA_ARGS__
#endif
#if defined(TSCNC_EMULATE_AVX512)
#define TSCNC_AVX512 wide
#else
#define TSCNC_AVX512 avx512
#endif
#define TSCNC_PER_ISA(...)                  \
  TSCNC_IN_NAMESPACE(portable, __VA_ARGS__) \
  TSCNC_PER_WIDE(__VA_ARGS__)               \
  TSCNC_IN_NAMESPACE(avx2, __VA_ARGS__)     \
  TSCNC_IN_NAMESPACE(TSCNC_AVX512, __VA_ARGS__)
#define TSCNC_SELECT(...)                                                               \
  ::tscnc::select_isa(&::tscnc::portable::__VA_ARGS__, TSCNC_WIDE_OR_AVX2(__VA_ARGS__), \
                      &::tscnc::avx2::__VA_ARGS__, &::tscnc::TSCNC_AVX512::__VA_ARGS__)
#endif

namespace tscnc {

enum class Isa { portable, wide, avx2, avx512 };

// The best instruction set of this CPU, lowered by TSCNC_ISA or set_isa().
Isa active_isa();

template <class Function>
Function select_isa(Function portable, Function wide, Function avx2, Function avx512) {
  switch (active_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::wide:
      return wide;
    default:
      return portable;
  }
}

}  // namespace tscnc
