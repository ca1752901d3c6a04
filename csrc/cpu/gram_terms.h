#pragma once

#include <cstdint>

#include "isa.h"

namespace tscnc {

// Columns of a strip: a cache line.
template <class T>
constexpr int64_t kTapStrip = 64 / sizeof(T);

// The taps of a group of kernels: tap (y, x) is an m x n matrix K in strips of kTapStrip<T>
// columns, each strip row by row, zeros behind the n-th column.
template <class T>
struct Taps {
  const T* strips;
  int64_t rows, cols;  // of the kernel
  int64_t m, n;
  int64_t tap_size;  // elements of all strips of a tap
};

// Rows of a correlation that are computed together.
constexpr int64_t kTermRows = 6;

TSCNC_PER_ISA(
    // Rows [row, row + kTermRows) of the n x n correlation, the sum over k of K_k^T K_{k + (down,
    // right)}, in float or double; those from the n-th on are left out.
    template <class T>
    void correlate(const Taps<T>& taps, int64_t down, int64_t right, int64_t row, T* correlation);)

}  // namespace tscnc
