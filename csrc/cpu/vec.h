// Vectors as wide as the instruction set this file is compiled for, over the compiler's vector
// extension: arithmetic, comparison and ?: work on Vec<T> directly. Half types are loaded as and
// stored from float vectors.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "storage_types.h"
#if defined(TSCNC_WIDE_VECTORS)
#include "avx512_emulation.h"
#endif

namespace tscnc::TSCNC_ISA {

#if defined(__AVX512F__) || defined(TSCNC_WIDE_VECTORS)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The arithmetic type of a storage type: float for the half types.
template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bf16> {
  using type = float;
};
template <>
struct ComputeOf<fp16> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// The vector in which elements of storage type T are computed on, and how many it holds.
template <class T>
struct VecOf {
  typedef Compute<T> type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute<T>));

using U16Half __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
inline Vec<T> load(const T* source) {
  Vec<T> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

template <class T>
inline void store(T* target, Vec<T> value) {
  std::memcpy(target, &value, sizeof(value));
}

inline Vec<float> load(const bf16* source) {
  U16Half bits;
  std::memcpy(&bits, source, sizeof(bits));
  const Vec<uint32_t> wide = __builtin_convertvector(bits, Vec<uint32_t>) << 16;
  Vec<float> result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// Rounds to nearest even; a NaN stays a quiet NaN.
inline void store(bf16* target, Vec<float> value) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> result = value == value ? rounded : (bits >> 16) | 0x40;
  const U16Half narrow = __builtin_convertvector(result, U16Half);
  std::memcpy(target, &narrow, sizeof(narrow));
}

#if defined(__AVX512F__) || defined(TSCNC_WIDE_VECTORS)
// With a full mask: the forms without one make gcc warn of uninitialised variables in its header.
inline Vec<float> load(const fp16* source) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, bits);
}
inline void store(fp16* target, Vec<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec<float> load(const fp16* source) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store(fp16* target, Vec<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent and mantissa shifted into place and rebiased by a multiplication, which also handles
// subnormals.
inline Vec<float> load(const fp16* source) {
  U16Half narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  const Vec<uint32_t> bits = __builtin_convertvector(narrow, Vec<uint32_t>);
  Vec<uint32_t> magnitude = (bits & 0x7fff) << 13;
  Vec<float> scaled;
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  std::memcpy(&magnitude, &scaled, sizeof(scaled));
  magnitude = (bits & 0x7c00) == 0x7c00 ? ((bits & 0x3ff) << 13) | 0x7f800000 : magnitude;
  magnitude |= (bits & 0x8000) << 16;
  Vec<float> result;
  std::memcpy(&result, &magnitude, sizeof(result));
  return result;
}
// Round to nearest even: subnormal results by adding a constant whose last place is 2^-24.
inline void store(fp16* target, Vec<float> value) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const Vec<uint32_t> sign = (bits >> 16) & 0x8000;
  const Vec<uint32_t> magnitude = bits & 0x7fffffff;
  Vec<float> positive;
  std::memcpy(&positive, &magnitude, sizeof(positive));
  const Vec<float> shifted = positive + 0.5f;
  Vec<uint32_t> subnormal;
  std::memcpy(&subnormal, &shifted, sizeof(subnormal));
  subnormal -= 0x3f000000;
  const Vec<uint32_t> normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Vec<uint32_t> result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? Vec<uint32_t>{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Vec<uint32_t>{} + 0x7e00 : result;
  const U16Half narrow = __builtin_convertvector(result | sign, U16Half);
  std::memcpy(target, &narrow, sizeof(narrow));
}
#endif

// The first `count` elements, zeros behind them.
template <class T>
inline Vec<T> load_partial(const T* source, int64_t count) {
  T buffer[kLanes<T>] = {};
  std::memcpy(buffer, source, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_partial(T* target, Vec<T> value, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, value);
  std::memcpy(target, buffer, static_cast<size_t>(count) * sizeof(T));
}

template <class V>
inline V abs(V value) {
  return value < 0 ? -value : value;
}

// Sum of the lanes, pairwise: halves are added until one lane is left.
template <class T>
inline T sum_lanes(Vec<T> value) {
  constexpr int n = kVectorBytes / static_cast<int>(sizeof(T));
  T lanes[n];
  std::memcpy(lanes, &value, sizeof(value));
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace tscnc::TSCNC_ISA
