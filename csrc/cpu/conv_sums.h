// Partial sums of weights' gradients: a vector for each weight, reduced at the end.
#pragma once

#include "transpose.h"

namespace tscnc::TSCNC_ISA {

template <class C>
inline int64_t whole_vectors(int64_t count) {
  return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// result[i] += the sum of vector i of `count` vectors, which are followed by zeros.
template <class C>
inline void add_sums(const C* vectors, int64_t count, C* result) {
  constexpr int kW = kLanes<C>;
  for (int64_t i = 0; i < count; i += kW) {
    Vec<C> part[kW];
#pragma GCC unroll 16
    for (int k = 0; k < kW; ++k) part[k] = load(vectors + (i + k) * kW);
    const Vec<C> total = sum_each<C>(part);
    if (i + kW <= count) {
      store(result + i, load(result + i) + total);
    } else {
      C lanes[kW];
      store(lanes, total);
      for (int64_t k = 0; i + k < count; ++k) result[i + k] += lanes[k];
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
