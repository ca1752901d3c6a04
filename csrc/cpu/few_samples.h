// What the kernels for few samples share: groups of samples, and columns that cannot lead outside.
#pragma once

#include <utility>

#include "masked_linear_small.h"
#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {

// Rows that are finished together: whole cache lines of a row-major output.
constexpr int64_t kSmallTileRows = 16;
// Up to 16 samples in at most four vectors.
template <class T>
constexpr int kGroupVecs = 16 / kLanes<T> < 4 ? 16 / kLanes<T> : 4;
template <class T>
constexpr int64_t kGroup = kGroupVecs<T> * kLanes<T>;

// The narrowest group for `count` samples.
template <class T, class Function>
inline void with_group_width(int64_t count, const Function& function) {
  if (kGroupVecs<T> == 1 || count <= kLanes<T>) {
    function(std::integral_constant<int, 1>());
  } else if (kGroupVecs<T> == 2 || count <= 2 * kLanes<T>) {
    function(std::integral_constant < int, kGroupVecs<T><2 ? kGroupVecs<T> : 2>());
  } else {
    function(std::integral_constant<int, kGroupVecs<T>>());
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Entries that are fetched ahead: the hardware alone does not keep up with two streams from memory.
constexpr int64_t kAhead = 512;

template <class C, class Index>
inline void fetch_ahead(const C* values, const Index* columns) {
  __builtin_prefetch(values + kAhead);
  __builtin_prefetch(columns + kAhead);
}

// A vector of a panel or of a sample has this many entries, a power of two, so that a mask keeps
// every column inside, whatever the index holds. Looking at the index before using it would read it
// twice, which costs a third of the time of a product with one sample.
inline int64_t padded_width(int64_t width) {
  int64_t padded = 1;
  while (padded < width) padded *= 2;
  return padded;
}

// Columns of a matrix whose padded width is mask + 1.
struct Columns {
  const int32_t* data;
  uint32_t mask;

  int64_t operator[](int64_t j) const { return static_cast<uint32_t>(data[j]) & mask; }
  Columns operator+(int64_t offset) const { return {data + offset, mask}; }
};

// Columns of 16 bits, which stay inside of kNarrowWidth entries by themselves.
struct NarrowColumns {
  const uint16_t* data;

  int64_t operator[](int64_t j) const { return data[j]; }
  NarrowColumns operator+(int64_t offset) const { return {data + offset}; }
};

inline Columns columns_of(const SparseRows& structure) {
  return {structure.columns, static_cast<uint32_t>(padded_width(structure.width) - 1)};
}

// Loads of single elements beat the gather instruction on CPUs that split it into many more
// operations than it has lanes.
template <class C, class Places, int... kLane>
inline Vec<C> gather(const C* source, Places places, std::integer_sequence<int, kLane...>) {
  return Vec<C>{source[places[kLane]]...};
}

template <class C, class Places>
inline Vec<C> gather(const C* source, Places places) {
  return gather<C>(source, places, std::make_integer_sequence<int, kLanes<C>>());
}

// The features [begin, end) of one sample in the arithmetic type, at target[begin .. end).
template <class T>
inline void copy_features(const Samples<T>& source, int64_t sample, int64_t begin, int64_t end,
                          Compute<T>* target) {
  int64_t k = begin;
  for (; k + kLanes<T> <= end; k += kLanes<T>) {
    store(target + k, load_features(source, sample, k, kLanes<T>));
  }
  if (k < end) store_partial(target + k, load_features(source, sample, k, end - k), end - k);
}

// Calls function(sample, count, width) for every group of samples.
template <class T, class Function>
inline void for_groups(int64_t samples, const Function& function) {
  for (int64_t sample = 0; sample < samples; sample += kGroup<T>) {
    const int64_t count = smaller(kGroup<T>, samples - sample);
    with_group_width<T>(count, [&](auto width) { function(sample, count, width); });
  }
}

}  // namespace tscnc::TSCNC_ISA
