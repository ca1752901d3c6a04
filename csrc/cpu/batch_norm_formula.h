// The formulas of batch_norm_relu that its plane form and its row form share.
#pragma once

#include "batch_norm_relu.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {

// Joins `count` further entries to a mean and a sum of squared deviations (Chan, Golub, LeVeque).
// Their sums are of the deviations from `shift`. A shift far from them costs no accuracy if it is
// the mean of at least as many entries before: the distance then dominates the variance, too.
inline void join(BatchNormSums& total, double before, double count, double shift, double sum,
                 double squares) {
  const double offset = sum / count;
  const double distance = shift + offset - total.first;
  const double all = before + count;
  total.second += squares - sum * offset + distance * distance * (before * count / all);
  total.first += distance * (count / all);
}

// What rounding the mean leaves: the sum of products with x - center becomes one with x - mean.
template <class S>
inline double rest_of_mean(const BatchNormChannel& how) {
  return how.mean - static_cast<double>(static_cast<S>(how.mean));
}

// A channel's formulas in the arithmetic type. `center` is the rounded mean, the rest of which goes
// into the constants: x - center is exact where it matters, for a mean far above the deviation.
template <class V>
struct Formula {
  V center, scale, offset, slope, level;

  template <bool kRelu>
  V output(V x) const {
    const V y = (x - center) * scale + offset;
    return kRelu ? (y < 0 ? V{} : y) : y;
  }
  // The gradient of the normalised and scaled entries.
  template <bool kRelu>
  V through(V g, V deviation) const {
    return kRelu ? (deviation * scale + offset <= 0 ? V{} : g) : g;
  }
  V input(V g, V deviation) const { return scale * g + (level - slope * deviation); }
};

template <class S>
inline Formula<S> formula(const BatchNormChannel& how) {
  const S center = static_cast<S>(how.mean);
  const double rest = rest_of_mean<S>(how);
  return {center, static_cast<S>(how.scale), static_cast<S>(how.bias - rest * how.scale),
          static_cast<S>(how.slope), static_cast<S>(how.slope * rest - how.level)};
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls run(Flag<relu>{}).
template <class Run>
inline void with_flag(bool relu, const Run& run) {
  relu ? run(Flag<true>{}) : run(Flag<false>{});
}

template <class T>
inline Formula<Vec<T>> vectors(const BatchNormChannel& how) {
  using S = Compute<T>;
  const Formula<S> f = formula<S>(how);
  return {broadcast(f.center), broadcast(f.scale), broadcast(f.offset), broadcast(f.slope),
          broadcast(f.level)};
}

}  // namespace tscnc::TSCNC_ISA
