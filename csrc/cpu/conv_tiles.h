// Tiles of a grid of results: as many vectors as registers hold, and how they leave them.
#pragma once

#include <utility>

#include "conv_planes.h"

namespace tscnc::TSCNC_ISA {

// `rows` x `vecs` vectors of results. Interleaved, they are the pixels from (row, column) on; else
// the pixels from `first` on, counted along the rows of the padded plane, some of which lie behind
// the end of a row of the grid. `first` is the place of the first one in a plane.
struct Tile {
  int64_t rows, vecs;
  int64_t row, column;
  int64_t first;
};

// Calls function(tile) for pieces of `vecs` vectors that cover the grid's rows [0, height) of
// planes that are not interleaved.
template <class T, class Function>
inline void for_each_piece(const Planes& planes, int64_t height, int64_t width, int64_t vecs,
                           const Function& function) {
  const int64_t most = vecs * kLanes<T>, count = (height - 1) * planes.width + width;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t left = count - first < most ? count - first : most;
    function(Tile{1, (left + kLanes<T> - 1) / kLanes<T>, 0, 0, first});
  }
}

// The same for interleaved planes: whole rows of the grid, `together` at once.
template <class T, class Function>
inline void for_each_rows(const Planes& planes, int64_t height, int64_t width, int64_t together,
                          const Function& function) {
  for (int64_t row = 0; row < height; row += together) {
    const int64_t rows = height - row < together ? height - row : together;
    function(Tile{rows, width, row, 0, row * planes.width * kLanes<T>});
  }
}

// Strips of results that are written together: one tile, or rows of tiles.
template <class T, class Function>
inline void for_each_strip(const Planes& planes, int64_t height, int64_t width,
                           const Function& function) {
  if (planes.interleaved) {
    for_each_rows<T>(planes, height, width, 2 * width <= kConvTileVecs ? 2 : 1, function);
  } else {
    for_each_piece<T>(planes, height, width, kConvTileVecs, function);
  }
}

// Runs that a weight's gradient is summed over in registers: long enough to make up for reducing
// the sums, short enough for their pixels to stay in a cache.
template <class T, class Function>
inline void for_each_run_of(const Planes& planes, int64_t height, int64_t width,
                            const Function& function) {
  if (planes.interleaved) {
    const int64_t rows = (kConvRunVecs + width - 1) / width;
    for_each_rows<T>(planes, height, width, rows, function);
  } else {
    for_each_piece<T>(planes, height, width, kConvRunVecs, function);
  }
}

// Calls function(tile) for the tiles of a strip.
template <class T, class Function>
inline void for_each_tile(const Planes& planes, const Tile& strip, const Function& function) {
  if (!planes.interleaved) return function(strip);
  const int64_t cuts = (strip.vecs + kConvTileVecs - 1) / kConvTileVecs;
  for (int64_t cut = 0; cut < cuts; ++cut) {
    const int64_t column = strip.vecs * cut / cuts, end = strip.vecs * (cut + 1) / cuts;
    function(Tile{strip.rows, end - column, strip.row, column, strip.first + column * kLanes<T>});
  }
}

// Calls function(rows, vecs) with the tile's sizes as constants.
template <class Function>
inline void with_tile_shape(const Tile& tile, const Function& function) {
  const auto call = [&](auto rows, auto vecs) {
    constexpr int kRows = decltype(rows)::value, kVecs = decltype(vecs)::value;
    if (tile.rows != kRows || tile.vecs != kVecs) return;
    function(rows, vecs);
  };
  const auto each = [&](auto rows, auto... vecs) { (call(rows, vecs), ...); };
  using std::integral_constant;
#define TSCNC_VECS(n) integral_constant<int, n>()
  each(TSCNC_VECS(1), TSCNC_VECS(1), TSCNC_VECS(2), TSCNC_VECS(3), TSCNC_VECS(4), TSCNC_VECS(5),
       TSCNC_VECS(6), TSCNC_VECS(7), TSCNC_VECS(8));
  each(TSCNC_VECS(2), TSCNC_VECS(1), TSCNC_VECS(2), TSCNC_VECS(3), TSCNC_VECS(4));
#undef TSCNC_VECS
}

// Where the results of one tensor go: strides in elements from a first image and row of the grid.
template <class T>
struct Target {
  T* data;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
};

template <class T>
inline void put(T* target, int64_t step, Vec<Compute<T>> value, int64_t count) {
  if (step != 1) {
    T buffer[kLanes<T>];
    store(buffer, value);
    for (int64_t i = 0; i < count; ++i) target[i * step] = buffer[i];
  } else if (count == kLanes<T>) {
    store(target, value);
  } else {
    store_first(target, value, count);
  }
}

// Calls function(lane, count, offset, step) for the runs of a tile: `count` lanes from `lane` on
// are results that lie at offset, offset + step, ... of the target.
template <class T, class Function>
inline void for_each_run(const Planes& planes, const Tile& tile, int64_t height, int64_t width,
                         int64_t present, const Target<T>& target, const Function& function) {
  constexpr int64_t kW = kLanes<T>;
  if (planes.interleaved) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t v = 0; v < tile.vecs; ++v) {
        const int64_t offset =
            (tile.row + r) * target.row_stride + (tile.column + v) * target.pixel_stride;
        function((r * tile.vecs + v) * kW, present, offset, target.image_stride);
      }
    }
    return;
  }
  int64_t row = tile.first / planes.width, column = tile.first % planes.width, lane = 0;
  for (; lane < tile.vecs * kW && row < height; ++row, column = 0) {
    const int64_t on_tile = tile.vecs * kW - lane;
    const int64_t in_grid = width - column < on_tile ? width - column : on_tile;
    for (int64_t j = 0; j < in_grid; j += kW) {
      function(lane + j, in_grid - j < kW ? in_grid - j : kW,
               row * target.row_stride + (column + j) * target.pixel_stride, target.pixel_stride);
    }
    lane += planes.width - column;
  }
}

// Writes the tile's results, sums[row * tile vectors], to the target's channels from its first on.
template <class T>
void unpack_tile(const Planes& planes, const Tile& tile, int64_t height, int64_t width,
                 int64_t present, const Compute<T>* sums, int64_t rows, const Target<T>& target) {
  using C = Compute<T>;
  constexpr int64_t kW = kLanes<T>;
  const int64_t size = tile.rows * tile.vecs * kW;
  if (target.channel_stride == 1 && target.pixel_stride != 1) {
    for_each_run<T>(planes, tile, height, width, present, target,
                    [&](int64_t lane, int64_t count, int64_t offset, int64_t step) {
                      for (int64_t row = 0; row < rows; row += kW) {
                        const int64_t left = rows - row < kW ? rows - row : kW;
                        Vec<C> block[kW] = {};
                        for (int i = 0; i < left; ++i)
                          block[i] = load(sums + (row + i) * size + lane);
                        transpose<C>(block);
                        for (int i = 0; i < count; ++i) {
                          put(target.data + offset + i * step + row, 1, block[i], left);
                        }
                      }
                    });
    return;
  }
  if (!planes.interleaved) {
    for (int64_t row = 0; row < rows; ++row) {
      T* data = target.data + row * target.channel_stride;
      for_each_run<T>(planes, tile, height, width, present, target,
                      [&](int64_t lane, int64_t count, int64_t offset, int64_t step) {
                        put(data + offset, step, load(sums + row * size + lane), count);
                      });
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      Vec<C> block[kW] = {};
      const C* from = sums + row * size + r * tile.vecs * kW;
      T* to = target.data + row * target.channel_stride + (tile.row + r) * target.row_stride +
              tile.column * target.pixel_stride;
      for (int64_t first = 0; first < tile.vecs; first += kW) {
        const int64_t left = tile.vecs - first < kW ? tile.vecs - first : kW;
        for (int64_t v = 0; v < kW; ++v) {
          block[v] = v < left ? load(from + (first + v) * kW) : Vec<C>{};
        }
        transpose<C>(block);
        for (int64_t g = 0; g < present; ++g) {
          put(to + g * target.image_stride + first * target.pixel_stride, target.pixel_stride,
              block[g], left);
        }
      }
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
