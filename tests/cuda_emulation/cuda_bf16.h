// A stand-in for CUDA's header of this name: bfloat16 as a storage type.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  // Rounds to the nearest, ties to even; a NaN stays one.
  __nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    bits = value != value ? uint16_t(0x7fff) : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }

 private:
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
