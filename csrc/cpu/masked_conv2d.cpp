#include "masked_conv2d.h"

#include <type_traits>

#include "conv_tiles.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Weights whose gradients are summed at once.
constexpr int kMostTogether = 8;

// The sums of one row for tiles of one shape: `begin` them at the bias, or go on from those in
// memory.
template <class C, int kRows, int kVecs>
void add_taps(const C* values, const int32_t* offsets, int64_t count, const C* planes,
              int64_t next_row, bool begin, C bias, C* sums, int64_t sum_row,
              const Repeat& repeat) {
  constexpr int kW = kLanes<C>, kSize = kRows * kVecs;
  constexpr int kUnroll = kSize > 4 ? 1 : kSize > 2 ? 2 : 4;
  for (int64_t tile = 0; tile < repeat.count; ++tile) {
    Vec<C> part[kUnroll][kSize] = {};
#pragma GCC unroll 8
    for (int v = 0; v < kSize; ++v) {
      part[0][v] = begin ? broadcast(bias) : load(sums + v / kVecs * sum_row + v % kVecs * kW);
    }
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
#pragma GCC unroll 8
    for (int v = 0; v < kSize; ++v) {
      Vec<C> sum = part[0][v];
#pragma GCC unroll 4
      for (int u = 1; u < kUnroll; ++u) sum += part[u][v];
      store(sums + v / kVecs * sum_row + v % kVecs * kW, sum);
    }
    planes += repeat.planes;
    sums += repeat.sums;
  }
}

template <class C>
struct AddTaps {
  template <int kRows, int kVecs>
  static constexpr auto get() {
    return &add_taps<C, kRows, kVecs>;
  }
};

// A run of gradients and the pixels that a weight of offset 0 meets: `rows` times `vecs` vectors.
template <class C>
struct Run {
  const C* gradient;
  int64_t gradient_row;
  const C* planes;
  int64_t planes_row;
  int64_t rows, vecs;
};

// result[j] += the inner product of the gradients with the pixels that weight j meets, for kCount
// weights at a time, whose sums stay in registers.
template <class C, int kCount>
inline void add_inner_products(const Run<C>& run, const int32_t* offsets, C* result) {
  constexpr int kW = kLanes<C>;
  static_assert(kCount <= kW || kCount <= kMostTogether, "more sums than vectors to reduce");
  const C* pixels[kCount];
  Vec<C> sum[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    pixels[i] = run.planes + offsets[i];
    sum[i] = Vec<C>{};
  }
  const C* gradient = run.gradient;
  for (int64_t row = 0, start = 0; row < run.rows; ++row, start += run.planes_row) {
    for (int64_t v = 0; v < run.vecs * kW; v += kW) {
      const Vec<C> held = load(gradient + v);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) sum[i] += held * load(pixels[i] + start + v);
    }
    gradient += run.gradient_row;
  }
  for (int first = 0; first < kCount; first += kW) {
    constexpr int kLeft = kCount < kW ? kCount : kW;
    Vec<C> part[kW] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) part[i] = sum[first + i];
    const Vec<C> total = sum_each<C>(part);
    if (kLeft == kW) {
      store(result + first, load(result + first) + total);
    } else {
      C lanes[kW];
      store(lanes, total);
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) result[first + i] += lanes[i];
    }
  }
}

template <class C>
inline void add_row_products(const Run<C>& run, const int32_t* offsets, int64_t count, C* result) {
  while (count >= kMostTogether) {
    add_inner_products<C, kMostTogether>(run, offsets, result);
    offsets += kMostTogether;
    result += kMostTogether;
    count -= kMostTogether;
  }
  const auto rest = [&](auto size) {
    constexpr int kCount = decltype(size)::value;
    if (!(count & kCount)) return;
    add_inner_products<C, kCount>(run, offsets, result);
    offsets += kCount;
    result += kCount;
  };
  rest(std::integral_constant<int, 4>());
  rest(std::integral_constant<int, 2>());
  rest(std::integral_constant<int, 1>());
}

// The planes that an output's gradient is packed into for the gradient of the weight: rows of whole
// vectors, with zeros behind their ends.
template <class T>
inline Planes gradient_planes(const Planes& planes, int64_t band, int64_t width,
                              const int32_t* phase) {
  const int64_t pixels = kLanes<T> / group_size<T>(planes);
  return {band,
          row_vecs<T>(planes, width) * pixels,
          0,
          0,
          1,
          1,
          1,
          1,
          phase,
          phase,
          planes.interleaved};
}

template <class T>
void product_tile(const ConvProduct<T>& call, const ConvPart<T>& part, const Tile& tile,
                  int64_t begin, int64_t end, const Compute<T>* packed, Compute<T>* sums,
                  int64_t sums_size, int64_t sum_row, const Repeat& repeat) {
  using C = Compute<T>;
  const Taps& taps = part.taps;
  const C* planes = packed + tile.first;
  const int64_t next_row = call.planes.width * group_size<T>(call.planes);
  const auto kernel = kernel_for<AddTaps<C>, kConvTileVecs>(tile);
  for (int64_t block = 0; block < taps.blocks; ++block) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* bounds = taps.bounds + block * taps.rows + row;
      const int64_t count = bounds[1] - bounds[0];
      if (count == 0 && block > 0) continue;
      const C bias = call.bias == nullptr ? C(0) : call.bias[row];
      kernel(part.values + bounds[0], taps.offsets + bounds[0], count, planes, next_row, block == 0,
             bias, sums + (row - begin) * sums_size, sum_row, repeat);
    }
  }
}

// One part's results for a band of a group of images.
template <class T>
void product_band(const ConvProduct<T>& call, const ConvPart<T>& part, int64_t image,
                  int64_t present, int64_t first_row, int64_t begin, int64_t end,
                  const Compute<T>* packed, Compute<T>* sums) {
  using C = Compute<T>;
  const int64_t left = part.height - first_row, height = left < call.band ? left : call.band;
  if (height <= 0 || part.width <= 0) return;
  const int64_t origin = part.output_offset + image * call.image_stride +
                         begin * call.channel_stride + first_row * call.row_stride;
  const Target<T> output{call.output + origin, call.image_stride, call.channel_stride,
                         call.row_stride, call.pixel_stride};
  const int32_t* bounds = part.taps.bounds + begin;
  if (end == begin + 1 && part.taps.blocks == 1 && bounds[0] == bounds[1]) {
    const Vec<C> value = broadcast(call.bias == nullptr ? C(0) : call.bias[begin]);
    if (call.preactivation != nullptr) {
      Target<T> target = output;
      target.data = call.preactivation + origin;
      fill<T>(target, present, height, part.width, value);
    }
    return fill<T>(output, present, height, part.width, activate<C>(value, call.activation));
  }
  const bool finished = call.preactivation == nullptr && call.activation == Activation::none;
  const int64_t rows = strip_rows<T>(call.planes, part.width, kConvTileVecs);
  const int64_t vecs = row_vecs<T>(call.planes, part.width);
  int64_t done = 0;
  if constexpr (std::is_same_v<T, C>) {
    const int64_t whole =
        finished ? whole_strips(call.planes, rows, height, part.width, output) : 0;
    const bool at_once = end == begin + 1 && vecs <= kConvTileVecs;
    const int64_t next = rows * call.planes.width, to_next = rows * output.row_stride;
    for (int64_t strip = 0; strip < whole; strip += at_once ? whole : 1) {
      const Tile tiles{rows, vecs, strip * rows, 0, strip * next};
      for_each_tile<T>(tiles, kConvTileVecs, [&](const Tile& tile) {
        product_tile<T>(call, part, tile, begin, end, packed,
                        output.data + strip * to_next + tile.column * kLanes<T>,
                        output.channel_stride, output.row_stride,
                        Repeat{at_once ? whole : 1, next, to_next, 0});
      });
    }
    done = whole * rows;
  }
  for_each_rows<T>(call.planes, done, height, part.width, rows, [&](const Tile& strip) {
    const int64_t row_size = strip.vecs * kLanes<T>, strip_size = strip.rows * row_size;
    for_each_tile<T>(strip, kConvTileVecs, [&](const Tile& tile) {
      product_tile<T>(call, part, tile, begin, end, packed, sums + tile.column * kLanes<T>,
                      strip_size, row_size, Repeat{1, 0, 0, 0});
    });
    const auto write = [&](const Target<T>& target) {
      unpack_tile<T>(call.planes, strip, height, part.width, present, sums, end - begin, target);
    };
    if (call.preactivation != nullptr) {
      Target<T> target = output;
      target.data = call.preactivation + origin;
      write(target);
    }
    if (call.activation != Activation::none) {
      const int64_t size = (end - begin) * strip_size;
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        store(sums + i, activate<C>(load(sums + i), call.activation));
      }
    }
    write(output);
  });
}

}  // namespace

template <class T>
int64_t masked_conv2d_lanes() {
  return kLanes<T>;
}

template <class T>
int64_t masked_conv2d_scratch(const Planes& planes, int64_t channels, int64_t rows, int64_t band) {
  constexpr int64_t kTile = kConvTileVecs * kLanes<T>;
  constexpr int32_t kPhase = 0;
  const int64_t row = row_vecs<T>(planes, planes.width) * kLanes<T>,
                strip = row > kTile ? row : kTile;
  const int64_t held =
      band == 0 ? 0 : channel_size<T>(gradient_planes<T>(planes, band, planes.width, &kPhase));
  return channels * channel_size<T>(planes) + kTile + rows * (held > strip ? held : strip) + kTile;
}

template <class T>
void masked_conv2d_product(const ConvProduct<T>& call, int64_t begin, int64_t end,
                           Working<T>* scratch) {
  const int64_t group = group_size<T>(call.planes);
  const int64_t bands = (call.height + call.band - 1) / call.band;
  const int64_t rows = call.parts[0].taps.rows;
  Compute<T>* sums =
      scratch + call.input.channels * channel_size<T>(call.planes) + kConvTileVecs * kLanes<T>;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t place = item / call.row_splits, split = item % call.row_splits;
    const int64_t image = place / bands * group, first_row = place % bands * call.band;
    const int64_t left = call.input.count - image, present = left < group ? left : group;
    if (packed != place) {
      pack_used<T>(call.input, call.planes, image, present, first_row, call.used, scratch);
    }
    packed = place;
    const int64_t row_begin = rows * split / call.row_splits;
    const int64_t row_end = rows * (split + 1) / call.row_splits;
    if (row_begin == row_end) continue;
    for (int64_t p = 0; p < call.part_count; ++p) {
      for (int64_t row = row_begin; row < row_end; row += call.together) {
        const int64_t row_last = row_end - row < call.together ? row_end : row + call.together;
        product_band<T>(call, call.parts[p], image, present, first_row, row, row_last, scratch,
                        sums);
      }
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
  const Planes held = gradient_planes<T>(call.planes, call.band, gradient.width, &kPhase);
  const int64_t held_size = channel_size<T>(held);
  const int64_t held_row = held.width * group;
  C* tiles =
      scratch + call.input.channels * channel_size<T>(call.planes) + kConvTileVecs * kLanes<T>;
  for (int64_t image = 0; image < gradient.count; image += group) {
    const int64_t left = gradient.count - image, present = left < group ? left : group;
    for (int64_t first_row = 0; first_row < gradient.height; first_row += call.band) {
      const int64_t below = gradient.height - first_row;
      const int64_t height = below < call.band ? below : call.band;
      Images<T> part = gradient;
      part.height = first_row + height;
      pack_planes<T>(part, held, image, present, first_row, begin, end, tiles);
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
      pack_used<T>(call.input, call.planes, image, present, first_row, call.used, scratch);
      for_each_run<T>(call.planes, height, gradient.width, [&](const Tile& strip) {
        const int64_t place = strip.row * held_row;
        for (int64_t block = 0; block < taps.blocks; ++block) {
          for (int64_t row = begin; row < end; ++row) {
            const int32_t* bounds = taps.bounds + block * taps.rows + row;
            const Run<C> run{tiles + (row - begin) * held_size + place,
                             held_row,
                             scratch + strip.first,
                             call.planes.width * group,
                             strip.rows,
                             strip.vecs};
            add_row_products<C>(run, taps.offsets + bounds[0], bounds[1] - bounds[0],
                                call.values_gradient + bounds[0]);
          }
        }
      });
    }
  }
}

#define TSCNC_INSTANTIATE(T)                                                                     \
  template int64_t masked_conv2d_lanes<T>();                                                     \
  template int64_t masked_conv2d_scratch<T>(const Planes&, int64_t, int64_t, int64_t);           \
  template void masked_conv2d_product<T>(const ConvProduct<T>&, int64_t, int64_t, Working<T>*);  \
  template void masked_conv2d_weight_gradient<T>(const ConvWeightGradient<T>&, int64_t, int64_t, \
                                                 Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
