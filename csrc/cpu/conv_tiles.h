// Tiles of a grid of results: as many vectors as registers hold, and how they leave them.
#pragma once

#include <utility>

#include "conv_planes.h"

namespace tscnc::TSCNC_ISA {

// `rows` x `vecs` vectors of results, from a row of the grid and a vector of that row on. A vector
// is one pixel of interleaved images, else kLanes neighbouring pixels of one image, the last of
// which may lie behind the end of the row. `first` is the place of the first pixel in a plane.
struct Tile {
  int64_t rows, vecs;
  int64_t row, column;
  int64_t first;
};

// Vectors of one row of a grid.
template <class T>
inline int64_t row_vecs(const Planes& planes, int64_t width) {
  return planes.interleaved ? width : (width + kLanes<T> - 1) / kLanes<T>;
}

// Calls function(tile) for whole rows of the grid's rows [from, height), `together` at once.
template <class T, class Function>
inline void for_each_rows(const Planes& planes, int64_t from, int64_t height, int64_t width,
                          int64_t together, const Function& function) {
  const int64_t vecs = row_vecs<T>(planes, width);
  const int64_t next_row = planes.width * group_size<T>(planes);
  for (int64_t row = from; row < height; row += together) {
    const int64_t rows = height - row < together ? height - row : together;
    function(Tile{rows, vecs, row, 0, row * next_row});
  }
}

// Rows of a strip of results: as many as fill a tile of at most `most` vectors.
template <class T>
inline int64_t strip_rows(const Planes& planes, int64_t width, int64_t most) {
  const int64_t vecs = row_vecs<T>(planes, width);
  return vecs < most ? most / vecs : 1;
}

// Runs that a weight's gradient is summed over in registers: long enough to make up for reducing
// the sums, short enough for their pixels to stay in a cache.
template <class T, class Function>
inline void for_each_run(const Planes& planes, int64_t height, int64_t width,
                         const Function& function) {
  const int64_t vecs = row_vecs<T>(planes, width);
  for_each_rows<T>(planes, 0, height, width, (kConvRunVecs + vecs - 1) / vecs, function);
}

// Calls function(tile) for the tiles of a strip, of at most `most` vectors and of similar widths.
template <class T, class Function>
inline void for_each_tile(const Tile& strip, int64_t most, const Function& function) {
  const int64_t cuts = (strip.vecs + most - 1) / most;
  for (int64_t cut = 0; cut < cuts; ++cut) {
    const int64_t column = strip.vecs * cut / cuts, end = strip.vecs * (cut + 1) / cuts;
    function(Tile{strip.rows, end - column, strip.row, column, strip.first + column * kLanes<T>});
  }
}

// How often a kernel runs on tiles of one shape, and the elements from one to the next.
struct Repeat {
  int64_t count, planes, sums, held;
};

// Table of a kernel's versions for all tiles of at most kMost vectors: Of::get<rows, vecs>().
template <class Of, int kMost, size_t... kShapes>
inline auto kernel_for(const Tile& tile, std::index_sequence<kShapes...>) {
  using Kernel = decltype(Of::template get<1, 1>());
  static constexpr Kernel kTable[] = {[] {
    constexpr int kRows = kShapes / kMost + 1, kVecs = kShapes % kMost + 1;
    if constexpr (kRows * kVecs <= kMost) return Of::template get<kRows, kVecs>();
    return Kernel(nullptr);
  }()...};
  return kTable[(tile.rows - 1) * kMost + tile.vecs - 1];
}

template <class Of, int kMost>
inline auto kernel_for(const Tile& tile) {
  return kernel_for<Of, kMost>(tile, std::make_index_sequence<kMost * kMost>());
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

// Calls function(lane, count, offset, step) for the vectors of a tile: `count` lanes from `lane` on
// are results that lie at offset, offset + step, ... of the target.
template <class T, class Function>
inline void for_each_vec(const Planes& planes, const Tile& tile, int64_t width, int64_t present,
                         const Target<T>& target, const Function& function) {
  constexpr int64_t kW = kLanes<T>;
  const int64_t pixels = planes.interleaved ? 1 : kW;
  const int64_t step = planes.interleaved ? target.image_stride : target.pixel_stride;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t v = 0; v < tile.vecs; ++v) {
      const int64_t column = (tile.column + v) * pixels;
      const int64_t left = width - column < kW ? width - column : kW;
      function((r * tile.vecs + v) * kW, planes.interleaved ? present : left,
               (tile.row + r) * target.row_stride + column * target.pixel_stride, step);
    }
  }
}

// Whether whole vectors of one channel's rows that end at row `end` may be stored where they
// belong, from the top of the grid down: what lies behind the end of a row is overwritten by the
// next ones.
template <class T>
inline bool stores_whole(const Planes& planes, int64_t end, int64_t height, int64_t width,
                         const Target<T>& target) {
  const int64_t behind = row_vecs<T>(planes, width) * kLanes<T> - width;
  return !planes.interleaved && target.pixel_stride == 1 && target.row_stride == width &&
         (height - end) * width >= behind;
}

// Strips of `rows` rows from the top of the grid that may be stored like this.
template <class T>
inline int64_t whole_strips(const Planes& planes, int64_t rows, int64_t height, int64_t width,
                            const Target<T>& target) {
  int64_t count = height / rows;
  while (count > 0 && !stores_whole(planes, count * rows, height, width, target)) --count;
  return count;
}

// The same value everywhere in one channel of `images` images.
template <class T>
void fill(const Target<T>& target, int64_t images, int64_t height, int64_t width,
          Vec<Compute<T>> value) {
  const bool joined = target.pixel_stride == 1 && target.row_stride == width;
  const int64_t rows = joined ? 1 : height, count = joined ? height * width : width;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t row = 0; row < rows; ++row) {
      T* to = target.data + image * target.image_stride + row * target.row_stride;
      int64_t i = 0;
      if (target.pixel_stride == 1) {
        for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, value);
      }
      for (; i < count; i += kLanes<T>) {
        const int64_t left = count - i < kLanes<T> ? count - i : kLanes<T>;
        put(to + i * target.pixel_stride, target.pixel_stride, value, left);
      }
    }
  }
}

// Writes `vecs` interleaved pixels to `present` images, kLanes pixels at a time; the last ones
// again if they do not fill a vector.
template <class T>
inline void unpack_row(const Compute<T>* from, int64_t vecs, int64_t present, bool overrun,
                       const Target<T>& target, T* to) {
  using C = Compute<T>;
  constexpr int64_t kW = kLanes<T>;
  const int64_t step = target.pixel_stride;
  Vec<C> block[kW];
  if (vecs < kW) {
    for (int64_t v = 0; v < kW; ++v) block[v] = v < vecs ? load(from + v * kW) : Vec<C>{};
    transpose<C>(block);
    for (int64_t g = 0; g < present; ++g) {
      put(to + g * target.image_stride, step, block[g], overrun ? kW : vecs);
    }
    return;
  }
  for (int64_t next = 0; next < vecs; next += kW) {
    const int64_t first = next + kW <= vecs ? next : vecs - kW;
#pragma GCC unroll 16
    for (int v = 0; v < kW; ++v) block[v] = load(from + (first + v) * kW);
    transpose<C>(block);
    T* pixels = to + first * step;
    if (present == kW && step == 1) {
#pragma GCC unroll 16
      for (int g = 0; g < kW; ++g) store(pixels + g * target.image_stride, block[g]);
    } else {
      for (int64_t g = 0; g < present; ++g) {
        put(pixels + g * target.image_stride, step, block[g], kW);
      }
    }
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
    for_each_vec<T>(planes, tile, width, present, target,
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
    const bool whole = stores_whole(planes, tile.row + tile.rows, height, width, target);
    for (int64_t row = 0; row < rows; ++row) {
      T* data = target.data + row * target.channel_stride;
      for_each_vec<T>(planes, tile, width, present, target,
                      [&](int64_t lane, int64_t count, int64_t offset, int64_t step) {
                        put(data + offset, step, load(sums + row * size + lane),
                            whole ? kW : count);
                      });
    }
    return;
  }
  // A full store behind a short row of the grid is overwritten by the rows that follow.
  const int64_t below = (height - tile.row - tile.rows) * width;
  const bool overrun = target.pixel_stride == 1 && target.row_stride == width && tile.vecs < kW &&
                       below >= kW - tile.vecs;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* from = sums + row * size + r * tile.vecs * kW;
      T* to = target.data + row * target.channel_stride + (tile.row + r) * target.row_stride +
              tile.column * target.pixel_stride;
      unpack_row(from, tile.vecs, present, overrun, target, to);
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
