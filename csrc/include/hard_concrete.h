// The hard concrete gate z = clip(s (zeta - gamma) + gamma, 0, 1), s = sigmoid(x), and its
// derivative.
//
// The caller supplies e = exp(-|x|): sigmoid(x) is then 1 / (1 + e) or e / (1 + e), which neither
// overflows nor cancels.
#pragma once

#include "host_device.h"

namespace tscnc {

// V is float, double or a CPU vector of them, S its element type: only operators that all of them
// have.

// x = (log u - log(1 - u) + log_alpha) / beta from the noise's log((1 - u) / u). At u = 0 and u = 1
// that is infinite; bounded, it still decides against any finite log_alpha, and an infinite
// log_alpha decides against it.
template <typename V, typename S>
TSCNC_HD V hard_concrete_argument(V log_alpha, V log_odds, S inverse_beta) {
  constexpr S kBound = S(1e30);
  const V bound = kBound - V{};
  const V above = log_odds > kBound ? bound : log_odds;
  const V bounded = above < -kBound ? -bound : above;
  return (log_alpha - bounded) * inverse_beta;
}

// s (zeta - gamma) + gamma, the gate before it is clipped.
template <typename V, typename S>
TSCNC_HD V hard_concrete_stretched(V x, V e, S gamma, S zeta) {
  const V one = S(1) - V{};
  const V numerator = x < 0 ? e : one;
  return numerator / (S(1) + e) * (zeta - gamma) + gamma;
}

template <typename V>
TSCNC_HD V hard_concrete_clip(V stretched) {
  const V zero = V{}, one = 1 - V{};
  const V positive = stretched < 0 ? zero : stretched;
  return positive > 1 ? one : positive;
}

// slope * s (1 - s), and 0 where the gate is clipped; slope = (zeta - gamma) / beta.
template <typename V, typename S>
TSCNC_HD V hard_concrete_derivative(V stretched, V e, S slope) {
  const V zero = V{};
  const V inner = S(1) / (S(1) + e);
  const V derivative = slope * e * (inner * inner);
  const V above = stretched <= 0 ? zero : derivative;
  return stretched >= 1 ? zero : above;
}

}  // namespace tscnc
