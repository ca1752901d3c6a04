// The transformed l1 penalty rho_a(|t|) = (a + 1)|t| / (a + |t|), a > 0, and its
// derivative.
#pragma once

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

}  // namespace tscnc
