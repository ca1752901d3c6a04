// A loop over an array in whole vectors, and once more for the entries that are left.
#pragma once

#include <cstdint>

#include "vec.h"

namespace tscnc::TSCNC_ISA {

template <class T>
struct Whole {
  Vec<T> load(const T* source) const { return TSCNC_ISA::load(source); }
  void store(T* target, Vec<T> value) const { TSCNC_ISA::store(target, value); }
  Vec<T> masked(Vec<T> value) const { return value; }
};

// Only `count` entries exist; the lanes behind them are loaded as zeros and not stored.
template <class T>
struct Rest {
  int64_t count;

  Vec<T> load(const T* source) const { return load_partial(source, count); }
  void store(T* target, Vec<T> value) const { store_partial(target, value, count); }
  // The value with zeros in the lanes that do not exist.
  Vec<T> masked(Vec<T> value) const {
    Compute<T> lanes[kLanes<T>];
    TSCNC_ISA::store(lanes, value);
    return load_partial(lanes, count);
  }
};

// Calls step(i, memory) for every vector; `memory` loads and stores what exists of it.
template <class T, class Step>
inline void for_vectors(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) step(i, Whole<T>{});
  if (i < count) step(i, Rest<T>{count - i});
}

}  // namespace tscnc::TSCNC_ISA
