#include "gram_terms.h"

#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Vectors of a tile's row; not more than a strip.
template <class T>
constexpr int64_t kVectors = kTapStrip<T> / kLanes<T> < 2 ? 1 : 2;

// A tile of kTermRows rows; `rows` point to elements of the first factor.
template <class T>
struct Tile {
  Vec<T> sums[kTermRows][kVectors<T>] = {};

  void add(const T* const* rows, const T* cols, int64_t m) {
    for (int64_t r = 0; r < m; ++r) {
      Vec<T> right[kVectors<T>];
      for (int64_t v = 0; v < kVectors<T>; ++v)
        right[v] = load(cols + r * kTapStrip<T> + v * kLanes<T>);
      for (int64_t e = 0; e < kTermRows; ++e) {
        const Vec<T> left = broadcast(rows[e][r * kTapStrip<T>]);
        for (int64_t v = 0; v < kVectors<T>; ++v) sums[e][v] += left * right[v];
      }
    }
  }
};

template <class T>
const T* column(const Taps<T>& taps, int64_t y, int64_t x, int64_t index) {
  return taps.strips + (y * taps.cols + x) * taps.tap_size +
         index / kTapStrip<T> * taps.m * kTapStrip<T> + index % kTapStrip<T>;
}

template <class T>
void store_tile(const Tile<T>& tile, int64_t row, int64_t col, int64_t n, T* correlation) {
  const int64_t rows = n - row < kTermRows ? n - row : kTermRows;
  for (int64_t e = 0; e < rows; ++e) {
    for (int64_t v = 0, j = col; v < kVectors<T> && j < n; ++v, j += kLanes<T>) {
      const int64_t count = n - j < kLanes<T> ? n - j : kLanes<T>;
      store_partial(correlation + (row + e) * n + j, tile.sums[e][v], count);
    }
  }
}

}  // namespace

template <class T>
void correlate(const Taps<T>& taps, int64_t down, int64_t right, int64_t row, T* correlation) {
  constexpr int64_t kCols = kVectors<T> * kLanes<T>;
  static_assert(kTapStrip<T> % kCols == 0);
  const int64_t first = right < 0 ? -right : 0;
  const int64_t last = right > 0 ? taps.cols - right : taps.cols;
  for (int64_t col = 0; col < taps.n; col += kCols) {
    Tile<T> tile;
    for (int64_t y = 0; y + down < taps.rows; ++y) {
      for (int64_t x = first; x < last; ++x) {
        const T* rows[kTermRows];
        for (int64_t e = 0; e < kTermRows; ++e) {
          // A row beyond the last is a copy of it, and not stored.
          const int64_t i = row + e < taps.n ? row + e : taps.n - 1;
          rows[e] = column(taps, y, x, i);
        }
        tile.add(rows, column(taps, y + down, x + right, col), taps.m);
      }
    }
    store_tile(tile, row, col, taps.n, correlation);
  }
}

template void correlate(const Taps<float>&, int64_t, int64_t, int64_t, float*);
template void correlate(const Taps<double>&, int64_t, int64_t, int64_t, double*);

}  // namespace tscnc::TSCNC_ISA
