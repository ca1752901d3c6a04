#include "masked_conv2d.h"

#include "conv_tiles.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr int64_t kMostTile = kConvTileVecs;

// A tile's sums for one row: `begin` them at the bias, or go on from those in memory.
template <class C, int kRows, int kVecs>
inline void add_taps(const C* values, const int32_t* offsets, int64_t count, const C* planes,
                     int64_t next_row, bool begin, C bias, C* sums) {
  constexpr int kW = kLanes<C>, kSize = kRows * kVecs;
  constexpr int kUnroll = kSize > 4 ? 1 : kSize > 2 ? 2 : 4;
  Vec<C> part[kUnroll][kSize] = {};
  for (int v = 0; v < kSize; ++v) part[0][v] = begin ? broadcast(bias) : load(sums + v * kW);
  const auto add = [&](int64_t j, Vec<C>* into) {
    const Vec<C> value = broadcast(values[j]);
    const C* pixels = planes + offsets[j];
#pragma GCC unroll 8
    for (int v = 0; v < kSize; ++v) {
      into[v] += value * load(pixels + v / kVecs * next_row + v % kVecs * kW);
    }
  };
  int64_t j = 0;
  for (; j + kUnroll <= count; j += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) add(j + u, part[u]);
  }
  for (; j < count; ++j) add(j, part[0]);
  for (int v = 0; v < kSize; ++v) {
    Vec<C> sum = part[0][v];
    for (int u = 1; u < kUnroll; ++u) sum += part[u][v];
    store(sums + v * kW, sum);
  }
}

// result[j] += the inner product of the tile of gradients with the pixels that weight j meets.
template <class C, int kRows, int kVecs>
inline void add_inner_products(const C* gradient, int64_t gradient_row, int64_t last_lanes,
                               const int32_t* offsets, int64_t count, const C* planes,
                               int64_t next_row, C* result) {
  constexpr int kW = kLanes<C>, kSize = kRows * kVecs;
  Vec<C> held[kSize];
  for (int v = 0; v < kSize; ++v) {
    held[v] = load(gradient + v / kVecs * gradient_row + v % kVecs * kW);
  }
  if (last_lanes < kW) held[kSize - 1] = load_partial(gradient + (kSize - 1) * kW, last_lanes);
  const auto product = [&](int32_t offset) {
    const C* pixels = planes + offset;
    Vec<C> sum = held[0] * load(pixels);
#pragma GCC unroll 8
    for (int v = 1; v < kSize; ++v) {
      sum += held[v] * load(pixels + v / kVecs * next_row + v % kVecs * kW);
    }
    return sum;
  };
  int64_t j = 0;
  for (; j + kW <= count; j += kW) {
    Vec<C> part[kW];
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) part[i] = product(offsets[j + i]);
    store(result + j, load(result + j) + sum_each<C>(part));
  }
  if (j == count) return;
  Vec<C> part[kW] = {};
  for (int i = 0; i < count - j; ++i) part[i] = product(offsets[j + i]);
  const Vec<C> sum = sum_each<C>(part);
  store_partial(result + j, load_partial(result + j, count - j) + sum, count - j);
}

template <class T>
void product_tile(const ConvProduct<T>& call, const ConvPart<T>& part, const Tile& tile,
                  int64_t begin, int64_t end, const Compute<T>* packed, Compute<T>* sums) {
  using C = Compute<T>;
  const Taps& taps = part.taps;
  const C* planes = packed + tile.first;
  const int64_t next_row = call.planes.width * kLanes<T>;
  with_tile_shape(tile, [&](auto rows, auto vecs) {
    constexpr int kRows = decltype(rows)::value, kVecs = decltype(vecs)::value;
    for (int64_t block = 0; block < taps.blocks; ++block) {
      for (int64_t row = begin; row < end; ++row) {
        const int32_t* bounds = taps.bounds + row * (taps.blocks + 1) + block;
        const int64_t count = bounds[1] - bounds[0];
        if (count == 0 && block > 0) continue;
        const C bias = call.bias == nullptr ? C(0) : load_partial(call.bias + row, 1)[0];
        add_taps<C, kRows, kVecs>(part.values + bounds[0], taps.offsets + bounds[0], count, planes,
                                  next_row, block == 0, bias,
                                  sums + (row - begin) * kRows * kVecs * kLanes<T>);
      }
    }
  });
}

// One part's results for a band of a group of images.
template <class T>
void product_band(const ConvProduct<T>& call, const ConvPart<T>& part, int64_t image,
                  int64_t present, int64_t first_row, int64_t begin, int64_t end,
                  const Compute<T>* packed, Compute<T>* sums) {
  using C = Compute<T>;
  const int64_t left = part.height - first_row, height = left < call.band ? left : call.band;
  if (height <= 0) return;
  const int64_t origin = part.output_offset + image * call.image_stride +
                         begin * call.channel_stride + first_row * call.row_stride;
  const auto write = [&](const Tile& tile, T* data) {
    const Target<T> target{data + origin, call.image_stride, call.channel_stride, call.row_stride,
                           call.pixel_stride};
    unpack_tile<T>(call.planes, tile, height, part.width, present, sums, end - begin, target);
  };
  for_each_tile<T>(call.planes, height, part.width, [&](const Tile& tile) {
    product_tile<T>(call, part, tile, begin, end, packed, sums);
    if (call.preactivation != nullptr) write(tile, call.preactivation);
    if (call.activation != Activation::none) {
      const int64_t size = (end - begin) * tile.rows * tile.vecs * kLanes<T>;
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        store(sums + i, activate<C>(load(sums + i), call.activation));
      }
    }
    write(tile, call.output);
  });
}

}  // namespace

template <class T>
int64_t masked_conv2d_lanes() {
  return kLanes<T>;
}

template <class T>
int64_t masked_conv2d_scratch(const Planes& planes, int64_t channels, int64_t rows, int64_t band) {
  constexpr int64_t kTile = kMostTile * kLanes<T>;
  const int64_t per_row = band * planes.width * group_size<T>(planes);
  return channels * channel_size<T>(planes) + kTile +
         rows * (per_row > kTile ? per_row : kTile) + kTile;
}

template <class T>
void masked_conv2d_product(const ConvProduct<T>& call, int64_t begin, int64_t end,
                           Working<T>* scratch) {
  const int64_t group = group_size<T>(call.planes);
  const int64_t bands = (call.height + call.band - 1) / call.band;
  const int64_t rows = call.parts[0].taps.rows;
  Compute<T>* sums =
      scratch + call.input.channels * channel_size<T>(call.planes) + kMostTile * kLanes<T>;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t place = item / call.row_splits, split = item % call.row_splits;
    const int64_t image = place / bands * group, first_row = place % bands * call.band;
    const int64_t left = call.input.count - image, present = left < group ? left : group;
    if (packed != place) {
      pack_planes<T>(call.input, call.planes, image, present, first_row, 0, call.input.channels,
                     scratch);
    }
    packed = place;
    const int64_t row_begin = rows * split / call.row_splits;
    const int64_t row_end = rows * (split + 1) / call.row_splits;
    if (row_begin == row_end) continue;
    for (int64_t p = 0; p < call.part_count; ++p) {
      product_band<T>(call, call.parts[p], image, present, first_row, row_begin, row_end, scratch,
                      sums);
    }
  }
}

template <class T>
void masked_conv2d_weight_gradient(const ConvWeightGradient<T>& call, int64_t begin, int64_t end,
                                   Working<T>* scratch) {
  using C = Compute<T>;
  const int64_t group = group_size<T>(call.planes);
  const Taps& taps = call.taps;
  const Images<T>& gradient = call.gradient;
  const bool products = call.values_gradient != nullptr;
  constexpr int32_t kPhase = 0;
  // The gradient's rows are as wide as the planes' where tiles run over the ends of rows.
  const Planes held{call.band, call.planes.interleaved ? gradient.width : call.planes.width,
                    0, 0, 1, 1, 1, 1, &kPhase, &kPhase, call.planes.interleaved};
  const int64_t held_size = channel_size<T>(held), held_row = held.width * kLanes<T>;
  C* tiles = scratch + call.input.channels * channel_size<T>(call.planes) +
             kMostTile * kLanes<T>;
  for (int64_t image = 0; image < gradient.count; image += group) {
    const int64_t left = gradient.count - image, present = left < group ? left : group;
    for (int64_t first_row = 0; first_row < gradient.height; first_row += call.band) {
      const int64_t below = gradient.height - first_row;
      const int64_t height = below < call.band ? below : call.band;
      pack_planes<T>(gradient, held, image, present, first_row, begin, end, tiles);
      if (call.bias_gradient != nullptr) {
        for (int64_t row = begin; row < end; ++row) {
          const C* entries = tiles + (row - begin) * held_size;
          Vec<C> sum = {};
          int64_t i = 0;
          for (; i + kLanes<T> <= held_size; i += kLanes<T>) sum += load(entries + i);
          if (i < held_size) sum += load_partial(entries + i, held_size - i);
          call.bias_gradient[row] += sum_lanes<C>(sum);
        }
      }
      if (!products) continue;
      pack_planes<T>(call.input, call.planes, image, present, first_row, 0, call.input.channels,
                     scratch);
      for_each_tile<T>(call.planes, height, gradient.width, [&](const Tile& tile) {
        const C* planes = scratch + tile.first;
        const int64_t place = call.planes.interleaved
                                  ? (tile.row * held.width + tile.column) * kLanes<T>
                                  : tile.first;
        with_tile_shape(tile, [&](auto rows, auto vecs) {
          constexpr int kRows = decltype(rows)::value, kVecs = decltype(vecs)::value;
          for (int64_t block = 0; block < taps.blocks; ++block) {
            for (int64_t row = begin; row < end; ++row) {
              const int32_t* bounds = taps.bounds + row * (taps.blocks + 1) + block;
              add_inner_products<C, kRows, kVecs>(
                  tiles + (row - begin) * held_size + place, held_row, tile.last_lanes,
                  taps.offsets + bounds[0], bounds[1] - bounds[0], planes,
                  call.planes.width * kLanes<T>, call.values_gradient + bounds[0]);
            }
          }
        });
      });
    }
  }
}

#define TSCNC_INSTANTIATE(T)                                                                      \
  template int64_t masked_conv2d_lanes<T>();                                                      \
  template int64_t masked_conv2d_scratch<T>(const Planes&, int64_t, int64_t, int64_t);            \
  template void masked_conv2d_product<T>(const ConvProduct<T>&, int64_t, int64_t, Working<T>*);   \
  template void masked_conv2d_weight_gradient<T>(const ConvWeightGradient<T>&, int64_t, int64_t, \
                                                 Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
