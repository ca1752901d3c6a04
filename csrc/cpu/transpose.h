// Squares of kLanes vectors: their transpose, and the sums of their rows in one vector.
#pragma once

#include <cstdint>
#include <utility>

#include "vec.h"

namespace tscnc::TSCNC_ISA {

template <int kBytes>
struct SignedOf;
template <>
struct SignedOf<4> {
  using type = int32_t;
};
template <>
struct SignedOf<8> {
  using type = int64_t;
};

// In every block of 2 * kHalf lanes: the chosen half (0 low, 1 high) of a, then that half of b.
template <class C, int kHalf, int kWhich, int... kLane>
inline Vec<C> join_halves(Vec<C> a, Vec<C> b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
#define TSCNC_LANE                                                            \
  (kLane / (2 * kHalf) * (2 * kHalf) + kLane % kHalf + (kWhich ? kHalf : 0) + \
   (kLane % (2 * kHalf) < kHalf ? 0 : n))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, TSCNC_LANE...);
#else
  const Vec<typename SignedOf<sizeof(C)>::type> lanes = {TSCNC_LANE...};
  return __builtin_shuffle(a, b, lanes);
#endif
#undef TSCNC_LANE
}

template <class C, int kHalf, int kWhich>
inline Vec<C> join_halves(Vec<C> a, Vec<C> b) {
  return join_halves<C, kHalf, kWhich>(a, b, std::make_integer_sequence<int, kLanes<C>>());
}

// Transposes kLanes vectors in place, swapping off-diagonal blocks of halving size.
template <class C, int kHalf = kLanes<C> / 2>
[[gnu::always_inline]] inline void transpose(Vec<C>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<C>; ++i) {
    if (i & kHalf) continue;
    const Vec<C> low = join_halves<C, kHalf, 0>(rows[i], rows[i + kHalf]);
    rows[i + kHalf] = join_halves<C, kHalf, 1>(rows[i], rows[i + kHalf]);
    rows[i] = low;
  }
  if constexpr (kHalf > 1) transpose<C, kHalf / 2>(rows);
}

// The vector whose lane i is the sum of the lanes of rows[i]; about one instruction per row.
template <class C, int kHalf = kLanes<C> / 2>
inline Vec<C> sum_each(Vec<C>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    rows[i] = join_halves<C, kHalf, 0>(rows[i], rows[i + kHalf]) +
              join_halves<C, kHalf, 1>(rows[i], rows[i + kHalf]);
  }
  if constexpr (kHalf > 1) return sum_each<C, kHalf / 2>(rows);
  return rows[0];
}

// sum_each of row(0), ..., row(kLanes - 1), computed in an order that leaves few of them in
// registers at a time.
template <class C, int kStep = 1, class Row>
inline Vec<C> sum_each_of(const Row& row, int first = 0) {
  if constexpr (kStep == kLanes<C>) {
    return row(first);
  } else {
    const Vec<C> a = sum_each_of<C, 2 * kStep>(row, first);
    const Vec<C> b = sum_each_of<C, 2 * kStep>(row, first + kStep);
    return join_halves<C, kStep, 0>(a, b) + join_halves<C, kStep, 1>(a, b);
  }
}

}  // namespace tscnc::TSCNC_ISA
