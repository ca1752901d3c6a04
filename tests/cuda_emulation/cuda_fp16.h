// A stand-in for CUDA's header of this name: half precision as a storage type.
#pragma once

struct __half {
  __half() = default;
  __half(float value) : value(static_cast<_Float16>(value)) {}
  operator float() const { return static_cast<float>(value); }

 private:
  _Float16 value;
};

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
