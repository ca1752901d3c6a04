// The transformed l1 penalty rho_a(|t|) = (a + 1)|t| / (a + |t|), a > 0, its derivative and its
// proximal map.
#pragma once

#include <cmath>

#include "host_device.h"

namespace tscnc {

// V is float, double or a CPU vector of them, S its element type: only operators that all of them
// have.

// 1/(a + |t|) comes first: large arguments cannot overflow, and a loop that wants the value and the
// gradient divides once.
template <typename V, typename S>
TSCNC_HD V transformed_l1_value(V t, S a) {
  const V magnitude = t < 0 ? -t : t;
  const V scale = S(1) / (a + magnitude);
  return (a + S(1)) * (magnitude * scale);
}

// d rho_a(|t|) / dt = sign(t) a (a + 1) / (a + |t|)^2, and 0 at t = 0 as for torch.abs.
template <typename V, typename S>
TSCNC_HD V transformed_l1_gradient(V t, S a) {
  const V magnitude = t < 0 ? -t : t;
  const V scale = S(1) / (a + magnitude);
  const V slope = (a * scale) * ((a + S(1)) * scale);
  return t == 0 ? t : (t < 0 ? -slope : slope);
}

// sin(x) for 0 <= x <= pi/6 by its series, whose next term is below double's rounding error. The
// library's sine also reduces large arguments, which costs a kernel local memory.
template <typename T>
TSCNC_HD T sine_up_to_one_half(T x) {
  const T x2 = x * x;
  T factor = T(1);
  for (int n = 14; n > 0; n -= 2) factor = T(1) - factor * x2 / T(n * (n + 1));
  return x * factor;
}

// argmin_y (y - x)^2 / 2 + lambda rho_a(|y|). Above the threshold the minimiser is the largest root
// of a cubic; written as |x| - (4/3)(a + |x|) sin^2(asin(sqrt(s)) / 3), it does not cancel.
template <typename T>
TSCNC_HD T transformed_l1_prox(T x, T lambda, T a) {
  const T magnitude = std::fabs(x);
  const T weight = lambda * (a + T(1));
  const T threshold = weight <= a * a / T(2) ? weight / a : std::sqrt(T(2) * weight) - a / T(2);
  if (magnitude <= threshold) return T(0);
  const T reach = a + magnitude;
  const T s = T(27) * weight * a / (T(4) * reach * reach * reach);
  const T sine = sine_up_to_one_half(std::asin(std::sqrt(s < T(1) ? s : T(1))) / T(3));
  return std::copysign(magnitude - T(4) / T(3) * reach * sine * sine, x);
}

}  // namespace tscnc
