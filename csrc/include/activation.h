// Activations that are fused into a product, and their derivatives.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace tscnc {

// The numbers are the ones that the Python side passes.
enum class Activation : int64_t { none = 0, relu = 1, gelu = 2 };

TSCNC_HD float activation_erf(float x) { return erff(x); }
TSCNC_HD double activation_erf(double x) { return ::erf(x); }
TSCNC_HD float activation_exp(float x) { return expf(x); }
TSCNC_HD double activation_exp(double x) { return ::exp(x); }

// z Phi(z), Phi the standard normal distribution function.
template <class T>
TSCNC_HD T gelu(T z) {
  constexpr T sqrt_half = static_cast<T>(0.70710678118654752440);
  return z * static_cast<T>(0.5) * (static_cast<T>(1) + activation_erf(z * sqrt_half));
}

// Phi(z) + z phi(z).
template <class T>
TSCNC_HD T gelu_gradient(T z) {
  constexpr T sqrt_half = static_cast<T>(0.70710678118654752440);
  constexpr T inverse_sqrt_two_pi = static_cast<T>(0.39894228040143267794);
  const T distribution = static_cast<T>(0.5) * (static_cast<T>(1) + activation_erf(z * sqrt_half));
  return distribution + z * inverse_sqrt_two_pi * activation_exp(static_cast<T>(-0.5) * z * z);
}

}  // namespace tscnc
