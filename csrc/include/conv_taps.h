// The kept weights of a convolution as taps on packed planes (cpu/masked_conv2d.h), for the forward
// product and for the gradient of the input. Built on every call: O(nnz), small beside nnz pixels.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/masked_conv2d.h"
#include "scratch.h"

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

struct OwnedTaps {
  std::vector<int32_t> bounds;
  const int32_t* offsets;
  int64_t rows, blocks;

  Taps get() const { return {bounds.data(), offsets, rows, blocks}; }
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

// Bytes of one channel that a tile reads, when taps reach over `rows` x `columns` more pixels.
inline int64_t tile_bytes(const Planes& planes, int64_t rows, int64_t columns, int64_t grid_width,
                          int64_t lanes, int64_t element_bytes) {
  const int64_t phases = planes.phases_h * planes.phases_w;
  int64_t pixels;
  if (planes.interleaved) {
    const int64_t cuts = (grid_width + kConvTileVecs - 1) / kConvTileVecs;
    const int64_t tile_rows = 2 * grid_width <= kConvTileVecs ? 2 : 1;
    pixels = (tile_rows + rows) * ((grid_width + cuts - 1) / cuts + columns) * lanes;
  } else {
    const int64_t tile = kConvTileVecs * lanes;
    pixels = std::min((rows + 1) * (tile + columns), tile + rows * planes.width + columns);
  }
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

// Pixels of packed planes as elements.
inline int64_t pixel_elements(const Planes& planes, int64_t lanes) {
  return planes.interleaved ? lanes : 1;
}

inline int64_t channel_elements(const Planes& planes, int64_t lanes) {
  return planes.phases_h * planes.phases_w * planes.rows * planes.width *
         pixel_elements(planes, lanes);
}

// Calls function(row, begin, end, place) for the entries begin to end of the pattern that lie at
// `place` on in blocks.
template <class Function>
void for_each_piece(const OwnedTaps& taps, const Function& function) {
  int32_t begin = 0;
  for (int64_t row = 0; row < taps.rows; ++row) {
    for (int64_t block = 0; block < taps.blocks; ++block) {
      const int32_t* bounds = taps.bounds.data() + block * taps.rows + row;
      const int32_t end = begin + bounds[1] - bounds[0];
      function(row, begin, end, bounds[0]);
      begin = end;
    }
  }
}

// Sums in place: entry i + 1 is the size of part i before and its end after.
inline void sum_up(std::vector<int32_t>& bounds) {
  for (size_t i = 1; i < bounds.size(); ++i) bounds[i] += bounds[i - 1];
}

// The structure of the forward product and of the weight's gradient.
inline OwnedTaps forward_taps(const ConvShape& shape, const SparseRows& structure,
                              const AxisTaps& h, const AxisTaps& w, const Planes& planes,
                              int64_t lanes, const ChannelBlocks& blocks, Scratch& memory) {
  const int64_t pixel = pixel_elements(planes, lanes), plane = planes.rows * planes.width;
  std::vector<int32_t> table;
  for (int64_t c = 0; c < shape.group_in(); ++c) {
    for (size_t kh = 0; kh < h.slot.size(); ++kh) {
      for (size_t kw = 0; kw < w.slot.size(); ++kw) {
        const int64_t index = (c * planes.phases_h + h.slot[kh]) * planes.phases_w + w.slot[kw];
        const int64_t offset = index * plane + h.step[kh] * planes.width + w.step[kw];
        table.push_back(static_cast<int32_t>(offset * pixel));
      }
    }
  }
  const int64_t rows = structure.rows;
  const int64_t block_width = blocks.channels * shape.height.kernel * shape.width.kernel;
  int32_t* offsets = memory.reserve<int32_t>(structure.pointers[rows] + 1);
  OwnedTaps taps{std::vector<int32_t>(static_cast<size_t>(rows * blocks.count + 1)), offsets, rows,
                 blocks.count};
  for (int64_t row = 0, j = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t end = block + 1 == blocks.count ? structure.width : (block + 1) * block_width;
      const int64_t first = j;
      while (j < structure.pointers[row + 1] && structure.columns[j] < end) ++j;
      taps.bounds[static_cast<size_t>(block * rows + row) + 1] = static_cast<int32_t>(j - first);
    }
  }
  sum_up(taps.bounds);
  for_each_piece(taps, [&](int64_t row, int32_t begin, int32_t end, int32_t place) {
    const int64_t first_channel = row / shape.group_out() * shape.group_in();
    const auto base = static_cast<int32_t>(first_channel * channel_elements(planes, lanes));
    for (int32_t j = begin; j < end; ++j) {
      offsets[place + j - begin] = table[static_cast<size_t>(structure.columns[j])] + base;
    }
  });
  return taps;
}

// Values in the pattern's order, as the blocks of forward_taps order them.
template <class C>
void to_blocks(const OwnedTaps& taps, const C* values, C* ordered) {
  for_each_piece(taps, [&](int64_t, int32_t begin, int32_t end, int32_t place) {
    std::copy(values + begin, values + end, ordered + place);
  });
}

// The inverse.
template <class C>
void from_blocks(const OwnedTaps& taps, const C* ordered, C* values) {
  for_each_piece(taps, [&](int64_t, int32_t begin, int32_t end, int32_t place) {
    std::copy(ordered + place, ordered + place + (end - begin), values + begin);
  });
}

// The structure of the input's gradient: part a * stride_w + b holds the weights that meet the
// pixels (a + i * stride_h, b + j * stride_w), by block of output channels, then by input channel.
// `values` are put into this order.
template <class C>
OwnedTaps backward_taps(const ConvShape& shape, const SparseRows& structure, const C* values,
                        const std::vector<AxisTaps>& h, const std::vector<AxisTaps>& w,
                        const Planes& planes, int64_t lanes, const ChannelBlocks& blocks,
                        Scratch& memory, Scratch& value_memory) {
  const int64_t pixel = pixel_elements(planes, lanes), channels = shape.in_channels;
  const int64_t parts = shape.height.stride * shape.width.stride;
  std::vector<int32_t> key, position;
  for (int64_t c = 0; c < shape.group_in(); ++c) {
    for (int64_t kh = 0; kh < shape.height.kernel; ++kh) {
      for (int64_t kw = 0; kw < shape.width.kernel; ++kw) {
        const auto meets = [](int64_t k) {
          return [k](const AxisTaps& axis) { return axis.slot[static_cast<size_t>(k)] == 0; };
        };
        const auto a = std::find_if(h.begin(), h.end(), meets(kh));
        const auto b = std::find_if(w.begin(), w.end(), meets(kw));
        const int64_t part = (a - h.begin()) * shape.width.stride + (b - w.begin());
        key.push_back(static_cast<int32_t>(part * blocks.count * channels + c));
        position.push_back(static_cast<int32_t>(
            (a->step[static_cast<size_t>(kh)] * planes.width + b->step[static_cast<size_t>(kw)]) *
            pixel));
      }
    }
  }
  const int32_t *pointers = structure.pointers, *columns = structure.columns;
  const int64_t kept = pointers[structure.rows];
  OwnedTaps taps{std::vector<int32_t>(static_cast<size_t>(parts * blocks.count * channels + 1)),
                 nullptr, channels, blocks.count};
  const auto for_entries = [&](const auto& function) {
    for (int64_t row = 0; row < structure.rows; ++row) {
      const int64_t group = row / shape.group_out(), local = row % shape.group_out();
      const int64_t base = local / blocks.channels * channels + group * shape.group_in();
      for (int32_t j = pointers[row]; j < pointers[row + 1]; ++j) {
        function(j, row, static_cast<size_t>(key[static_cast<size_t>(columns[j])] + base));
      }
    }
  };
  for_entries([&](int32_t, int64_t, size_t place) { ++taps.bounds[place + 1]; });
  sum_up(taps.bounds);
  std::vector<int32_t> next = taps.bounds;
  int32_t* offsets = memory.reserve<int32_t>(kept + 1);
  C* ordered = value_memory.reserve<C>(kept + 1);
  const int64_t size = channel_elements(planes, lanes);
  for_entries([&](int32_t j, int64_t row, size_t place) {
    const int32_t to = next[place]++;
    offsets[to] = static_cast<int32_t>(row * size) + position[static_cast<size_t>(columns[j])];
    ordered[to] = values[j];
  });
  taps.offsets = offsets;
  return taps;
}

}  // namespace tscnc
