// The intrinsics of the kernels for AVX512_BF16, as avx512_emulation.h has those of AVX-512.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#include <cfloat>

#include "avx512_emulation.h"

namespace tscnc::TSCNC_ISA {

// In every 128 bits: the first four (`first` 0) or last four words of a, each before b's.
inline __m512i interleave_words(__m512i a, __m512i b, int first) {
  const Words left = same_bits<Words>(a), right = same_bits<Words>(b);
  Words result;
  for (int i = 0; i < 32; ++i) {
    const int source = i / 8 * 8 + first + i % 8 / 2;
    result.lane[i] = i % 2 == 0 ? left.lane[source] : right.lane[source];
  }
  return same_bits<__m512i>(result);
}

inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return interleave_words(a, b, 0); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return interleave_words(a, b, 4); }

// In every 128 bits: four signed numbers of a, then four of b, narrowed to unsigned words.
inline __m512i _mm512_packus_epi32(__m512i a, __m512i b) {
  const DoubleWords left = same_bits<DoubleWords>(a), right = same_bits<DoubleWords>(b);
  Words result;
  for (int i = 0; i < 32; ++i) {
    const int source = i / 8 * 4 + i % 4;
    const auto value = static_cast<int32_t>(i % 8 < 4 ? left.lane[source] : right.lane[source]);
    result.lane[i] = static_cast<uint16_t>(value < 0 ? 0 : value > 0xffff ? 0xffff : value);
  }
  return same_bits<__m512i>(result);
}

inline float zero_if_subnormal(float value) {
  return __builtin_fabsf(value) < FLT_MIN ? __builtin_copysignf(0, value) : value;
}

// sum + a[2i + 1] b[2i + 1] + a[2i] b[2i], each addition fused with its product and rounded to
// nearest even; subnormal operands and results count as zeros.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const DoubleWords left = same_bits<DoubleWords>(a), right = same_bits<DoubleWords>(b);
  Floats result = same_bits<Floats>(sum);
  const auto add = [](float total, uint32_t x, uint32_t y) {
    return zero_if_subnormal(__builtin_fmaf(zero_if_subnormal(same_bits<float>(x)),
                                            zero_if_subnormal(same_bits<float>(y)),
                                            zero_if_subnormal(total)));
  };
  for (int i = 0; i < 16; ++i) {
    const uint32_t x = left.lane[i], y = right.lane[i];
    result.lane[i] = add(result.lane[i], x & 0xffff0000, y & 0xffff0000);
    result.lane[i] = add(result.lane[i], x << 16, y << 16);
  }
  return same_bits<__m512>(result);
}

}  // namespace tscnc::TSCNC_ISA
