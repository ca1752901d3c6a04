// How a convolution is laid out on packed planes (cpu/masked_conv2d.h).
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/masked_conv2d.h"

namespace tscnc {

// One dimension of a convolution.
struct ConvAxis {
  int64_t size, kernel, stride, before, after, dilation;

  int64_t output() const {
    return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1;
  }
};

struct ConvShape {
  int64_t in_channels, out_channels, groups;
  ConvAxis height, width;

  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
};

// Packed planes with the phases that they own.
struct OwnedPlanes {
  Planes planes;
  std::vector<int32_t> phase_h, phase_w;
  int64_t band;  // rows of the grid that they serve

  const Planes& get() {
    planes.phase_h = phase_h.data();
    planes.phase_w = phase_w.data();
    planes.phases_h = static_cast<int64_t>(phase_h.size());
    planes.phases_w = static_cast<int64_t>(phase_w.size());
    return planes;
  }
};

// Blocks of channels: `channels` each, `count` of them.
struct ChannelBlocks {
  int64_t channels, count;
};

// What one thread's tile reads of a channel should fit beside the tile's sums in a first-level
// cache, and a row's weights in one block be enough to pay for reloading the sums.
inline ChannelBlocks channel_blocks(int64_t channels, int64_t rows, int64_t kept,
                                    int64_t bytes_per_channel) {
  constexpr int64_t kCacheBytes = 24 * 1024, kFewestTaps = 8;
  const int64_t fitting =
      std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, bytes_per_channel));
  const int64_t most = std::max<int64_t>(1, kept / (std::max<int64_t>(1, rows) * kFewestTaps));
  const int64_t count = std::min(most, (channels + fitting - 1) / fitting);
  const int64_t size = (channels + count - 1) / count;
  return {size, (channels + size - 1) / size};
}

// Pixels of packed planes as elements.
inline int64_t pixel_elements(const Planes& planes, int64_t lanes) {
  return planes.interleaved ? lanes : 1;
}

// Bytes of one channel that a tile reads, when taps reach over `rows` x `columns` more pixels.
inline int64_t tile_bytes(const Planes& planes, int64_t rows, int64_t columns, int64_t grid_width,
                          int64_t lanes, int64_t element_bytes) {
  const int64_t phases = planes.phases_h * planes.phases_w;
  const int64_t step = planes.interleaved ? 1 : lanes;
  const int64_t vecs = (grid_width + step - 1) / step;
  const int64_t cuts = (vecs + kConvTileVecs - 1) / kConvTileVecs;
  const int64_t tile_rows = vecs < kConvTileVecs ? kConvTileVecs / vecs : 1;
  const int64_t tile_columns = (vecs + cuts - 1) / cuts * step;
  const int64_t pixels =
      (tile_rows + rows) * (tile_columns + columns) * pixel_elements(planes, lanes);
  return pixels * phases * element_bytes;
}

// Where a kernel position meets planes: phase and step along one axis.
struct AxisTaps {
  std::vector<int32_t> phases;  // those in use
  std::vector<int32_t> slot;    // per kernel position: its phase's place, -1 where there is none
  std::vector<int64_t> step;    // per kernel position: pixels of the plane
  int64_t reach;                // the largest step
};

inline AxisTaps forward_axis(const ConvAxis& axis) {
  AxisTaps taps{{}, {}, {}, 0};
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const auto phase = static_cast<int32_t>(k * axis.dilation % axis.stride);
    auto place = std::find(taps.phases.begin(), taps.phases.end(), phase);
    if (place == taps.phases.end()) place = taps.phases.insert(place, phase);
    taps.slot.push_back(static_cast<int32_t>(place - taps.phases.begin()));
    taps.step.push_back(k * axis.dilation / axis.stride);
    taps.reach = std::max(taps.reach, taps.step.back());
  }
  return taps;
}

// The input's gradient at positions phase, phase + stride, ... along one axis: kernel position k
// meets the output's gradient at i + step[k] (slot 0), or nowhere (slot -1).
inline AxisTaps backward_axis(const ConvAxis& axis, int64_t phase, int64_t padding) {
  AxisTaps taps{{0}, {}, {}, 0};
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t place = phase + axis.before - k * axis.dilation;
    const bool meets = place % axis.stride == 0;
    taps.slot.push_back(meets ? 0 : -1);
    taps.step.push_back(meets ? place / axis.stride + padding : 0);
    taps.reach = std::max(taps.reach, taps.step.back());
  }
  return taps;
}

// Pixels in front of the output's gradient that the input's gradient reaches back to.
inline int64_t backward_padding(const ConvAxis& axis) {
  int64_t padding = 0;
  for (int64_t phase = 0; phase < axis.stride; ++phase) {
    for (const int64_t step : backward_axis(axis, phase, 0).step) {
      padding = std::max(padding, -step);
    }
  }
  return padding;
}

// The largest element of packed planes must have an int32 offset.
inline void check_offsets(const char* op, int64_t channels, const Planes& planes, int64_t lanes) {
  const double elements = static_cast<double>(channels) * planes.phases_h * planes.phases_w *
                          planes.rows * planes.width * (planes.interleaved ? lanes : 1);
  STD_TORCH_CHECK(elements < 2147483648.0, op, ": the input is too large for 32-bit offsets (",
                  elements, " packed elements); use algorithm='dense'");
}

inline int64_t channel_elements(const Planes& planes, int64_t lanes) {
  return planes.phases_h * planes.phases_w * planes.rows * planes.width *
         pixel_elements(planes, lanes);
}

// Rows of the grid that are packed at once: bands of equal height whose planes stay in the caches
// near the core, high enough that packing the rows that neighbouring bands share costs little. That
// costs more where images are interleaved.
inline int64_t band_rows(int64_t height, int64_t reach, int64_t row_bytes, bool interleaved) {
  constexpr int64_t kFewestRows = 4;
  const int64_t packed_bytes = interleaved ? 1 << 20 : 1 << 18;
  const int64_t fitting = std::max(packed_bytes / std::max<int64_t>(1, row_bytes) - reach,
                                   std::max(kFewestRows, reach));
  const int64_t bands = (height + fitting - 1) / fitting;
  return (height + bands - 1) / bands;
}

// Per channel of the input, whether a kept weight reads it.
inline std::vector<uint8_t> used_inputs(const ConvShape& shape, const SparseRows& structure) {
  std::vector<uint8_t> used(static_cast<size_t>(shape.in_channels));
  const auto kernel = static_cast<int32_t>(shape.height.kernel * shape.width.kernel);
  int64_t left = shape.in_channels;
  for (int64_t row = 0; row < structure.rows && left > 0; ++row) {
    const int64_t first = row / shape.group_out() * shape.group_in();
    for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      uint8_t& here = used[static_cast<size_t>(first + structure.columns[j] / kernel)];
      left -= 1 - here;
      here = 1;
    }
  }
  return used;
}

// Per channel of the output, whether it has a kept weight.
inline std::vector<uint8_t> used_outputs(const SparseRows& structure) {
  std::vector<uint8_t> used;
  for (int64_t row = 0; row < structure.rows; ++row) {
    used.push_back(structure.pointers[row] < structure.pointers[row + 1]);
  }
  return used;
}

// A grid of results and the images it is computed from, along both axes.
struct Grid {
  int64_t channels, packed;  // all, and those that are packed
  int64_t height, width;
  int64_t top, left, stride_h, stride_w;
};

// Planes for a band of the grid's rows, with taps that reach as far as h and w say.
inline OwnedPlanes planes_for(const char* op, const Grid& grid, const AxisTaps& h,
                              const AxisTaps& w, bool interleaved, int64_t lanes,
                              int64_t element_bytes) {
  OwnedPlanes owned{{0, grid.width + w.reach, grid.top, grid.left, grid.stride_h, grid.stride_w, 0,
                     0, nullptr, nullptr, interleaved},
                    h.phases,
                    w.phases,
                    0};
  owned.planes.rows = 1;
  const int64_t row_bytes = grid.packed * channel_elements(owned.get(), lanes) * element_bytes;
  owned.band = band_rows(grid.height, h.reach, row_bytes, interleaved);
  owned.planes.rows = owned.band + h.reach;
  check_offsets(op, grid.channels, owned.get(), lanes);
  return owned;
}

}  // namespace tscnc
