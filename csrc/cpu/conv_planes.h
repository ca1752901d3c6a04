// Packing images into padded planes (masked_conv2d.h).
//
// C is the arithmetic type, T the storage type. Packed planes lie channel by channel, phase by
// phase; behind the last there is room for one tile, zeroed, which tiles at the end may read.
#pragma once

#include "masked_conv2d.h"
#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {

// Images in one group, and so elements of one packed pixel.
template <class T>
inline int64_t group_size(const Planes& planes) {
  return planes.interleaved ? kLanes<T> : 1;
}

template <class T>
inline int64_t channel_size(const Planes& planes) {
  return planes.phases_h * planes.phases_w * planes.rows * planes.width * group_size<T>(planes);
}

// Elements offset, offset + step, ...; lanes from `count` on hold anything.
template <class T>
inline Vec<Compute<T>> gather(const Images<T>& source, int64_t offset, int64_t step,
                              int64_t count) {
  using C = Compute<T>;
  const auto read = [&](const T* data) {
    if (step == 1) {
      return offset + kLanes<T> <= source.extent ? load(data) : load_partial(data, count);
    }
    T buffer[kLanes<T>] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = data[i * step];
    return load(buffer);
  };
  const Vec<C> value = read(source.data + offset);
  if (source.saved == nullptr) return value;
  return activation_gradient<C>(value, read(source.saved + offset), source.activation);
}

// Writes elements [0, count) by pieces of fixed size: a copy of variable size is a call.
template <class T>
inline void store_first(T* target, Vec<Compute<T>> value, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, value);
  int64_t done = 0;
#pragma GCC unroll 4
  for (int64_t piece = kLanes<T> / 2; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    for (int64_t i = 0; i < piece; ++i) target[done + i] = buffer[done + i];
    done += piece;
  }
}

// Pixels of one plane's row: elements offset, offset + step, ... of the first image and channel.
struct PixelRun {
  int64_t offset, step, count;
};

// `read(offset, count)` gives elements offset, offset + step, ...
template <class T, class Read>
inline void pack_run(const Images<T>& source, const PixelRun& run, int64_t present,
                     bool interleaved, Compute<T>* target, const Read& read) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  for (int64_t next = 0; next < run.count; next += kW) {
    // Interleaved, the last pixels are packed again if they do not fill a vector.
    const bool again = interleaved && next + kW > run.count && run.count > kW;
    const int64_t j = again ? run.count - kW : next;
    const int64_t left = run.count - j < kW ? run.count - j : kW;
    const int64_t offset = run.offset + j * run.step;
    if (!interleaved) {
      // What is stored behind the run is overwritten later: rows are packed in order.
      store(target + j, read(offset, left));
      continue;
    }
    Vec<C> pixels[kW];
    if (present == kW) {
#pragma GCC unroll 16
      for (int g = 0; g < kW; ++g) pixels[g] = read(offset + g * source.image_stride, left);
    } else {
      for (int g = 0; g < kW; ++g) {
        pixels[g] = g < present ? read(offset + g * source.image_stride, left) : Vec<C>{};
      }
    }
    transpose<C>(pixels);
    if (left == kW) {
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(target + (j + i) * kW, pixels[i]);
    } else {
      for (int i = 0; i < left; ++i) store(target + (j + i) * kW, pixels[i]);
    }
  }
}

template <class T>
inline void pack_run(const Images<T>& source, const PixelRun& run, int64_t present,
                     bool interleaved, Compute<T>* target) {
  const int64_t last = run.offset + (present - 1) * source.image_stride + run.count + kLanes<T>;
  if (run.step == 1 && source.saved == nullptr && last <= source.extent) {
    pack_run(source, run, present, interleaved, target,
             [&](int64_t offset, int64_t) { return load(source.data + offset); });
  } else {
    pack_run(source, run, present, interleaved, target, [&](int64_t offset, int64_t count) {
      return gather(source, offset, run.step, count);
    });
  }
}

// One row of a plane: `count` neighbours in memory from `offset` on, at column `low` between zeros.
// What is stored behind the row is overwritten later. The same row of the next channel is fetched.
template <class T>
inline void pack_row(const Images<T>& source, int64_t offset, int64_t count, int64_t low,
                     int64_t width, Compute<T>* target) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kLine = 64 / static_cast<int>(sizeof(T));
  const T* from = source.data + offset;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + source.channel_stride + i);
  for (int64_t i = 0; i < low; i += kW) store(target + i, Vec<C>{});
  if (source.saved == nullptr) {
    for (int64_t i = 0; i < count; i += kW) store(target + low + i, load(from + i));
  } else {
    const T* saved = source.saved + offset;
    for (int64_t i = 0; i < count; i += kW) {
      store(target + low + i,
            activation_gradient<C>(load(from + i), load(saved + i), source.activation));
    }
  }
  for (int64_t i = low + count; i < width; i += kW) store(target + i, Vec<C>{});
}

// The same for `channels` neighbours of one pixel in memory, each to its own plane.
template <class T>
inline void pack_channels(const Images<T>& source, const PixelRun& run, int64_t present,
                          bool interleaved, int64_t channels, Compute<T>* target, int64_t stride) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  const int64_t count = interleaved ? present : run.count;
  const int64_t step = interleaved ? source.image_stride : run.step;
  for (int64_t pixel = 0; pixel < (interleaved ? run.count : 1); ++pixel) {
    for (int64_t j = 0; j < count; j += kW) {
      const int64_t left = count - j < kW ? count - j : kW;
      Vec<C> lanes[kW];
      for (int i = 0; i < kW; ++i) {
        const int64_t offset = run.offset + pixel * run.step + (j + i) * step;
        lanes[i] = i < left ? gather(source, offset, 1, channels) : Vec<C>{};
      }
      transpose<C>(lanes);
      C* to = target + (interleaved ? pixel * kW : j);
      for (int c = 0; c < channels; ++c) {
        if (interleaved || left == kW) {
          store(to + c * stride, lanes[c]);
        } else {
          store_first(to + c * stride, lanes[c], left);
        }
      }
    }
  }
}

// Zeros pixels [begin, end). Without `exact` it may write on, to what is packed later.
template <class C>
inline void clear(C* row, int64_t begin, int64_t end, int64_t group, bool exact) {
  constexpr int kW = kLanes<C>;
  begin *= group;
  end *= group;
  if (group == 1 && exact) {
    for (int64_t i = begin; i < end; ++i) row[i] = 0;
    return;
  }
  for (int64_t i = begin; i < end; i += kW) store(row + i, Vec<C>{});
}

// Channels [begin, end) of `present` images from `image` on: the planes' rows from `first_row` on,
// zero where they lie outside the image and in lanes without one.
template <class T>
void pack_planes(const Images<T>& source, const Planes& planes, int64_t image, int64_t present,
                 int64_t first_row, int64_t begin, int64_t end, Compute<T>* packed) {
  using C = Compute<T>;
  const int64_t group = group_size<T>(planes), size = channel_size<T>(planes);
  const bool channels_inner = source.channel_stride == 1 && source.pixel_stride != 1;
  const int64_t together = channels_inner ? kLanes<T> : 1;
  const auto bounded = [&](int64_t value) {
    return value < 0 ? 0 : value > planes.width ? planes.width : value;
  };
  for (int64_t channel = begin; channel < end; channel += together) {
    const int64_t channels = end - channel < together ? end - channel : together;
    C* row = packed + (channel - begin) * size;
    for (int64_t a = 0; a < planes.phases_h; ++a) {
      for (int64_t b = 0; b < planes.phases_w; ++b) {
        // Column j of the plane holds column j * stride_w + shift of the image.
        const bool plain = !planes.interleaved && planes.stride_w * source.pixel_stride == 1;
        const int64_t shift = planes.phase_w[b] - planes.left, step = planes.stride_w;
        const int64_t low = bounded(shift < 0 ? (-shift + step - 1) / step : 0);
        const int64_t high =
            bounded(source.width > shift ? (source.width - shift - 1) / step + 1 : 0);
        for (int64_t i = 0; i < planes.rows; ++i, row += planes.width * group) {
          const int64_t h = (first_row + i) * planes.stride_h + planes.phase_h[a] - planes.top;
          const bool inside = h >= 0 && h < source.height && low < high;
          const int64_t from = inside ? low : planes.width, to = inside ? high : planes.width;
          const PixelRun run{image * source.image_stride + channel * source.channel_stride +
                                 h * source.row_stride + (low * step + shift) * source.pixel_stride,
                             step * source.pixel_stride, high - low};
          if (inside && plain && run.offset + run.count + kLanes<T> <= source.extent) {
            pack_row(source, run.offset, run.count, low, planes.width, row);
            continue;
          }
          for (int64_t c = 0; c < channels; ++c) {
            clear(row + c * size, 0, from, group, channels_inner);
          }
          if (!inside) continue;
          if (channels_inner) {
            pack_channels(source, run, present, planes.interleaved, channels, row + low * group,
                          size);
          } else {
            pack_run(source, run, present, planes.interleaved, row + low * group);
          }
          for (int64_t c = 0; c < channels; ++c) {
            clear(row + c * size, to, planes.width, group, channels_inner);
          }
        }
      }
    }
  }
  C* behind = packed + (end - begin) * size;
  for (int i = 0; i < kConvTileVecs; ++i) store(behind + i * kLanes<C>, Vec<C>{});
}

// All channels of which some kept weight reads; null for all. What kernels read beyond a channel is
// zero or belongs to the next.
template <class T>
void pack_used(const Images<T>& source, const Planes& planes, int64_t image, int64_t present,
               int64_t first_row, const uint8_t* used, Compute<T>* packed) {
  int64_t begin = 0, channels = source.channels;
  while (begin < channels) {
    int64_t end = begin;
    while (end < channels && (used == nullptr || used[end])) ++end;
    if (end > begin) {
      pack_planes<T>(source, planes, image, present, first_row, begin, end,
                     packed + begin * channel_size<T>(planes));
    }
    begin = end + 1;
  }
}

}  // namespace tscnc::TSCNC_ISA
