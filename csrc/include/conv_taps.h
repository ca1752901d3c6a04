// The kept weights of a convolution as taps on packed planes, for the forward product and for the
// gradient of the input. Built on every call: O(nnz), small beside nnz pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_plan.h"
#include "scratch.h"

namespace tscnc {

struct OwnedTaps {
  std::vector<int32_t> bounds;
  const int32_t* offsets;
  int64_t rows, blocks;
  const int32_t* places;  // of the pattern's entries among the input gradient's taps

  Taps get() const { return {bounds.data(), offsets, rows, blocks}; }
};

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
                 blocks.count, nullptr};
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
                 nullptr, channels, blocks.count, nullptr};
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
  // Kernels look up pixels to fetch behind the last offset.
  constexpr int64_t kBehind = 16;
  int32_t* offsets = memory.reserve<int32_t>(2 * kept + kBehind);
  std::fill(offsets + kept, offsets + kept + kBehind, 0);
  int32_t* places = offsets + kept + kBehind;
  C* ordered = value_memory.reserve<C>(kept + 1);
  const int64_t size = channel_elements(planes, lanes);
  for_entries([&](int32_t j, int64_t row, size_t place) {
    const int32_t to = next[place]++;
    offsets[to] = static_cast<int32_t>(row * size) + position[static_cast<size_t>(columns[j])];
    ordered[to] = values[j];
    places[j] = to;
  });
  taps.offsets = offsets;
  taps.places = places;
  return taps;
}

}  // namespace tscnc
