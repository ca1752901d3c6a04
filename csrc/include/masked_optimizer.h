// The optimizer steps' arithmetic, element by element; formulas:
// tscnc_kernels/ops/masked_optimizer.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace tscnc {

// One parameter with its gradient and state. Without a pattern (`pointers` null) all four hold the
// same entries. With one, the parameter and the gradient are dense matrices of `width` columns and
// the state holds the kept entries, row by row.
struct StepTensor {
  void* param;
  const void* grad;
  void* first;       // momentum buffer, or first moment; null without momentum
  void* second;      // second moment
  void* max_second;  // its running maximum, or null
  const int32_t* pointers;
  const int32_t* columns;
  int64_t width;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers hold nothing yet
};

struct AdamwOptions {
  double beta1, beta2, eps;
  double step_size;     // lr / (1 - beta1^t)
  double inverse_root;  // 1 / sqrt(1 - beta2^t)
  double decay;         // what the parameter is multiplied by: decoupled weight decay
  double l2;            // weight decay that joins the gradient
  bool maximize;
};

// S is float or double, V the same or a CPU vector of it.

template <typename S>
struct SgdFormula {
  S lr, momentum, fresh, weight_decay;
  bool nesterov, maximize, first_step;

  TSCNC_HD explicit SgdFormula(const SgdOptions& o)
      : lr(static_cast<S>(o.lr)),
        momentum(static_cast<S>(o.momentum)),
        fresh(static_cast<S>(1 - o.dampening)),
        weight_decay(static_cast<S>(o.weight_decay)),
        nesterov(o.nesterov),
        maximize(o.maximize),
        first_step(o.first_step) {}

  template <typename V>
  TSCNC_HD V gradient(V param, V grad) const {
    V g = grad;
    if (maximize) g = -g;
    if (weight_decay != 0) g += weight_decay * param;
    return g;
  }

  template <typename V>
  TSCNC_HD V buffer(V gradient, V held) const {
    return momentum * held + fresh * gradient;
  }

  template <typename V>
  TSCNC_HD V direction(V gradient, V buffer) const {
    return nesterov ? gradient + momentum * buffer : buffer;
  }
};

template <typename S>
struct AdamwFormula {
  S fresh1, beta2, fresh2, eps, step_size, inverse_root, decay, l2;
  bool maximize;

  TSCNC_HD explicit AdamwFormula(const AdamwOptions& o)
      : fresh1(static_cast<S>(1 - o.beta1)),
        beta2(static_cast<S>(o.beta2)),
        fresh2(static_cast<S>(1 - o.beta2)),
        eps(static_cast<S>(o.eps)),
        step_size(static_cast<S>(o.step_size)),
        inverse_root(static_cast<S>(o.inverse_root)),
        decay(static_cast<S>(o.decay)),
        l2(static_cast<S>(o.l2)),
        maximize(o.maximize) {}

  template <typename V>
  TSCNC_HD V gradient(V param, V grad) const {
    V g = grad;
    if (maximize) g = -g;
    if (l2 != 0) g += l2 * param;
    return g;
  }

  template <typename V>
  TSCNC_HD V first_moment(V gradient, V held) const {
    return held + fresh1 * (gradient - held);
  }

  template <typename V>
  TSCNC_HD V second_moment(V gradient, V held) const {
    return beta2 * held + fresh2 * gradient * gradient;
  }

  // A NaN stays, as in torch.maximum.
  template <typename V>
  TSCNC_HD V larger(V moment, V held) const {
    return moment > held || moment != moment ? moment : held;
  }

  // `root` is the square root of the second moment.
  template <typename V>
  TSCNC_HD V stepped(V param, V first, V root) const {
    return param * decay - step_size * (first / (root * inverse_root + eps));
  }
};

}  // namespace tscnc
