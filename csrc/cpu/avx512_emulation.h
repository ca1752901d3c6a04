// The AVX-512 intrinsics that kernels use, made of AVX2 instructions under the same names, so that
// the instruction set `wide` compiles and runs the very lines that AVX-512 does. They stand in this
// namespace, where they hide the compiler's own.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Some compilers define the intrinsics with immediate operands as macros.
#undef _mm512_maskz_cvtph_ps
#undef _mm512_maskz_cvtps_ph

namespace tscnc::TSCNC_ISA {

template <class To, class From>
inline To same_bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "the bits of another size are not the same");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

struct Floats {
  float lane[16];
};
struct Words {
  uint16_t lane[32];
};
struct DoubleWords {
  uint32_t lane[16];
};
struct Halves {
  __m256 half[2];
};

inline __m512 _mm512_maskz_cvtph_ps(__mmask16 mask, __m256i source) {
  const Halves halves = {_mm256_cvtph_ps(_mm256_castsi256_si128(source)),
                         _mm256_cvtph_ps(_mm256_extracti128_si256(source, 1))};
  Floats result = same_bits<Floats>(halves);
  for (int i = 0; i < 16; ++i) result.lane[i] = mask >> i & 1 ? result.lane[i] : 0;
  return same_bits<__m512>(result);
}

// Only with the rounding that kernels ask for.
inline __m256i _mm512_maskz_cvtps_ph(__mmask16 mask, __m512 source, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  Floats kept = same_bits<Floats>(source);
  for (int i = 0; i < 16; ++i) kept.lane[i] = mask >> i & 1 ? kept.lane[i] : 0;
  const Halves halves = same_bits<Halves>(kept);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.half[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves.half[0], _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace tscnc::TSCNC_ISA
