#include "direct_conv.h"

#include <utility>

#include "conv_sums.h"
#include "conv_tiles.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Weights ahead whose pixels are fetched.
constexpr int64_t kAhead = 8;

// Elements of a tensor, in the neighbourhood of which a kernel reads. Checked, what lies outside of
// it reads as zero.
template <class T, bool kChecked>
struct Around {
  const T* data;
  int64_t size;

  Vec<Compute<T>> operator()(int64_t place) const {
    constexpr int64_t kW = kLanes<T>;
    if (!kChecked || (place >= 0 && place + kW <= size)) return load(data + place);
    T lanes[kW] = {};
    for (int64_t i = 0; i < kW; ++i) {
      if (place + i >= 0 && place + i < size) lanes[i] = data[place + i];
    }
    return load(lanes);
  }
};

template <class C>
inline Vec<C> masked(Vec<C> value, const MaskBits<C>* mask) {
  using Bits = Vec<MaskBits<C>>;
  return bit_cast<Vec<C>>(bit_cast<Bits>(value) & load(mask));
}

// `times` neighbouring tiles of equal masks: where the pixels and masks of the first begin, and
// where its results go.
template <class T>
struct DirectTile {
  const T* data;
  int64_t size;          // of the tensor read
  int64_t first, image;  // element that tap offset 0 meets, and from one image to the next
  const MaskBits<Compute<T>>* masks;
  T *result, *preactivation;  // or null
  int64_t result_image;
  int64_t last;  // pixels of the tile's last vector
  Activation activation;
  int64_t times;

  // To the next tile, of `length` pixels as this one.
  void advance(int64_t length) {
    first += length;
    if (result != nullptr) result += length;
    if (preactivation != nullptr) preactivation += length;
  }
};

// Writes a tile's vectors, kVecs of each image, to its place in a tensor.
template <class T, int kImages, int kVecs, class Value>
inline void put_tile(const DirectTile<T>& tile, T* result, const Value& value) {
#pragma GCC unroll 8
  for (int v = 0; v < kImages * kVecs; ++v) {
    const int column = v % kVecs;
    put(result + v / kVecs * tile.result_image + column * kLanes<T>, 1, value(v),
        column == kVecs - 1 ? tile.last : kLanes<T>);
  }
}

// Apart from the kernels, whose code it would multiply.
template <class C>
[[gnu::noinline]] void activate_sums(C* sums, int64_t vecs, Activation activation) {
  for (int64_t i = 0; i < vecs * kLanes<C>; i += kLanes<C>) {
    store(sums + i, activate<C>(load(sums + i), activation));
  }
}

template <class T, bool kChecked, int kImages, int kVecs>
[[gnu::always_inline]] inline void add_to_tile(const DirectTile<T>& tile, const Compute<T>* values,
                                               const int32_t* offsets, const int32_t* masks,
                                               int64_t count, Compute<T> bias) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kSize = kImages * kVecs;
  constexpr int kUnroll = kSize > 4 ? 1 : kSize > 2 ? 2 : 4;
  const Around<T, kChecked> pixels{tile.data, tile.size};
  Vec<C> part[kUnroll][kSize] = {};
#pragma GCC unroll 8
  for (int v = 0; v < kSize; ++v) part[0][v] = broadcast(bias);
  const auto add = [&](int64_t j, Vec<C>* into) {
    const Vec<C> value = broadcast(values[j]);
    const int64_t place = tile.first + offsets[j];
    const MaskBits<C>* mask = tile.masks + masks[j];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 8
      for (int i = 0; i < kImages; ++i) {
        into[i * kVecs + v] +=
            value * masked<C>(pixels(place + i * tile.image + v * kW), mask + v * kW);
      }
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
#pragma GCC unroll 4
    for (int u = 1; u < kUnroll; ++u) part[0][v] += part[u][v];
  }
  const auto sum = [&](int v) { return part[0][v]; };
  if (tile.preactivation != nullptr) {
    put_tile<T, kImages, kVecs>(tile, tile.preactivation, sum);
  }
  if (tile.activation == Activation::none) {
    return put_tile<T, kImages, kVecs>(tile, tile.result, sum);
  }
  C sums[kSize * kW];
  for (int v = 0; v < kSize; ++v) store(sums + v * kW, part[0][v]);
  activate_sums(sums, kSize, tile.activation);
  put_tile<T, kImages, kVecs>(tile, tile.result, [&](int v) { return load(sums + v * kW); });
}

template <class T, bool kChecked, int kImages, int kVecs>
void add_direct(DirectTile<T> tile, const Compute<T>* values, const int32_t* offsets,
                const int32_t* masks, int64_t count, Compute<T> bias) {
  for (int64_t t = 0; t < tile.times; ++t, tile.advance(kVecs * kLanes<T>)) {
    add_to_tile<T, kChecked, kImages, kVecs>(tile, values, offsets, masks, count, bias);
  }
}

// The same for the input's gradient, and into products[j], a vector of partial sums, what the tile
// contributes to the gradient of weight j.
template <class T, bool kChecked, int kImages, int kVecs>
[[gnu::always_inline]] inline void add_both_to_tile(const DirectTile<T>& tile, const T* input,
                                                    const Compute<T>* values,
                                                    const int32_t* offsets, const int32_t* masks,
                                                    int64_t count, Compute<T>* products) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kSize = kImages * kVecs;
  const Around<T, kChecked> pixels{tile.data, tile.size};
  Vec<C> sum[kSize], held[kSize];
#pragma GCC unroll 4
  for (int v = 0; v < kSize; ++v) {
    sum[v] = Vec<C>{};
    const T* from = input + v / kVecs * tile.result_image + v % kVecs * kW;
    const bool whole = v % kVecs < kVecs - 1 || tile.last == kW;
    held[v] = whole ? load(from) : load_partial(from, tile.last);
  }
  for (int64_t j = 0; j < count; ++j) {
    if (!kChecked) __builtin_prefetch(tile.data + tile.first + offsets[j + kAhead]);
    const Vec<C> value = broadcast(values[j]);
    const int64_t place = tile.first + offsets[j];
    const MaskBits<C>* mask = tile.masks + masks[j];
    Vec<C> product = load(products + j * kW);
#pragma GCC unroll 4
    for (int v = 0; v < kSize; ++v) {
      const Vec<C> gradient =
          masked<C>(pixels(place + v / kVecs * tile.image + v % kVecs * kW), mask + v % kVecs * kW);
      sum[v] += value * gradient;
      product += held[v] * gradient;
    }
    store(products + j * kW, product);
  }
  if (tile.result == nullptr) return;
  put_tile<T, kImages, kVecs>(tile, tile.result, [&](int v) { return sum[v]; });
}

template <class T, bool kChecked, int kImages, int kVecs>
void add_both_direct(DirectTile<T> tile, const T* input, const Compute<T>* values,
                     const int32_t* offsets, const int32_t* masks, int64_t count,
                     Compute<T>* products) {
  constexpr int64_t kLength = kVecs * kLanes<T>;
  for (int64_t t = 0; t < tile.times; ++t, tile.advance(kLength)) {
    add_both_to_tile<T, kChecked, kImages, kVecs>(tile, input + t * kLength, values, offsets, masks,
                                                  count, products);
  }
}

template <class T>
struct AddDirect {
  template <int kImages, int kVecs>
  static constexpr auto get() {
    return &add_direct<T, false, kImages, kVecs>;
  }
};

template <class T>
struct AddBothDirect {
  template <int kImages, int kVecs>
  static constexpr auto get() {
    return &add_both_direct<T, false, kImages, kVecs>;
  }
};

// Calls function(vector) for each vector of a tile, as a tile of its own.
template <class T, class Function>
void for_each_vector(const DirectTile<T>& tile, const Tile& shape, const Function& function) {
  const auto moved = [](T* to, int64_t by) { return to == nullptr ? nullptr : to + by; };
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t v = 0; v < shape.vecs; ++v) {
      DirectTile<T> part = tile;
      const int64_t by = i * tile.result_image + v * kLanes<T>;
      part.first += i * tile.image + v * kLanes<T>;
      part.masks += v * kLanes<T>;
      part.result = moved(tile.result, by);
      part.preactivation = moved(tile.preactivation, by);
      if (v < shape.vecs - 1) part.last = kLanes<T>;
      function(part, by);
    }
  }
}

// Of a group of images, the tiles of one row's channel and what it reads.
template <class T>
struct DirectRow {
  const Channels<T>& source;
  const DirectTiles<Compute<T>>& tiles;
  int64_t image, images;
  int32_t begin, count;     // of its taps
  int64_t lowest, highest;  // what they read lies between, up to the pixel's place

  DirectRow(const Channels<T>& source, const DirectTiles<Compute<T>>& tiles, const DirectTaps& taps,
            int64_t image, int64_t row)
      : source(source),
        tiles(tiles),
        image(image),
        images(source.count - image < tiles.together ? source.count - image : tiles.together),
        begin(taps.bounds[row]),
        count(taps.bounds[row + 1] - begin),
        lowest(0),
        highest(0) {
    if (count == 0) return;
    // The taps are in the order of the channels that they read.
    const int64_t image_size = source.channels * source.pixels;
    lowest = image * image_size + taps.offsets[begin] - 2 * taps.reach;
    highest = (image + images - 1) * image_size + taps.offsets[begin + count - 1] + 2 * taps.reach;
  }

  // Calls function(tiles, shape of each, first pixel, whether reads may leave the tensor); the
  // caller fills in where the results go.
  template <class Function>
  void for_each_tile(const Function& function) const {
    constexpr int64_t kW = kLanes<T>;
    const int64_t length = tiles.vecs * kW, image_size = source.channels * source.pixels;
    const int64_t size = source.count * image_size;
    int64_t times = 1;
    for (int64_t t = 0, pixel = 0; t < tiles.count; t += times, pixel += times * length) {
      const int64_t left = source.pixels - pixel;
      const int64_t vecs = left < length ? (left + kW - 1) / kW : tiles.vecs;
      const bool leaves = lowest + pixel < 0 || highest + pixel + vecs * kW > size;
      const auto follows = [&](int64_t tile) {
        return tile < tiles.count && tiles.starts[tile] == tiles.starts[t] &&
               (tile - t + 1) * length <= left && highest + pixel + (tile - t + 1) * length <= size;
      };
      times = 1;
      while (!leaves && follows(t + times)) ++times;
      DirectTile<T> tile{source.data,
                         size,
                         image * image_size + pixel,
                         image_size,
                         tiles.masks + tiles.starts[t],
                         nullptr,
                         nullptr,
                         0,
                         left < vecs * kW ? left - (vecs - 1) * kW : kW,
                         Activation::none,
                         times};
      function(tile, Tile{images, vecs, 0, 0, 0}, pixel, leaves);
    }
  }
};

template <class T>
Compute<T> sum_of(const T* entries, int64_t count) {
  using C = Compute<T>;
  constexpr int64_t kW = kLanes<T>;
  Vec<C> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kW <= count; i += 4 * kW) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k] += load(entries + i + k * kW);
  }
  for (; i + kW <= count; i += kW) sum[0] += load(entries + i);
  if (i < count) sum[1] += load_partial(entries + i, count - i);
  return sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The same value at all pixels of a channel that no weight leads to.
template <class T>
void fill_channel(T* channel, int64_t image_stride, int64_t images, int64_t pixels,
                  Vec<Compute<T>> value) {
  fill<T>(Target<T>{channel, image_stride, pixels, pixels, 1}, images, 1, pixels, value);
}

}  // namespace

template <class T>
void direct_conv_product(const DirectProduct<T>& call, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t pixels = call.input.pixels, rows = call.taps.rows, image_size = rows * pixels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / call.row_splits * call.tiles.together;
    const int64_t split = item % call.row_splits;
    const int64_t last = rows * (split + 1) / call.row_splits;
    for (int64_t row = rows * split / call.row_splits; row < last; ++row) {
      const DirectRow<T> part(call.input, call.tiles, call.taps, image, row);
      const int64_t place = image * image_size + row * pixels;
      const C bias = call.bias == nullptr ? C(0) : call.bias[row];
      if (part.count == 0) {
        const Vec<C> value = broadcast(bias);
        fill_channel(call.output + place, image_size, part.images, pixels,
                     activate<C>(value, call.activation));
        if (call.preactivation != nullptr) {
          fill_channel(call.preactivation + place, image_size, part.images, pixels, value);
        }
        continue;
      }
      part.for_each_tile([&](DirectTile<T>& tile, const Tile& shape, int64_t pixel, bool leaves) {
        tile.result = call.output + place + pixel;
        if (call.preactivation != nullptr) tile.preactivation = call.preactivation + place + pixel;
        tile.result_image = image_size;
        tile.activation = call.activation;
        const int32_t *offsets = call.taps.offsets + part.begin,
                      *masks = call.taps.masks + part.begin;
        const C* values = call.values + part.begin;
        if (!leaves) {
          return kernel_for<AddDirect<T>, kDirectVecs>(shape)(tile, values, offsets, masks,
                                                              part.count, bias);
        }
        for_each_vector<T>(tile, shape, [&](const DirectTile<T>& vector, int64_t) {
          add_direct<T, true, 1, 1>(vector, values, offsets, masks, part.count, bias);
        });
      });
    }
  }
}

template <class T>
int64_t direct_conv_backward_scratch(int64_t most) {
  return whole_vectors<Compute<T>>(most) * kLanes<T>;
}

template <class T>
void direct_conv_backward(const DirectBackward<T>& call, int64_t begin, int64_t end,
                          int64_t bias_begin, int64_t bias_end, Working<T>* scratch) {
  using C = Compute<T>;
  constexpr int64_t kW = kLanes<T>;
  const Channels<T>& gradient = call.gradient;
  const int64_t pixels = gradient.pixels, image_size = call.taps.rows * pixels;
  for (int64_t image = 0; image < gradient.count; image += call.tiles.together) {
    const int64_t left = gradient.count - image;
    const int64_t images = left < call.tiles.together ? left : call.tiles.together;
    for (int64_t i = image; call.bias_gradient != nullptr && i < image + images; ++i) {
      for (int64_t channel = bias_begin; channel < bias_end; ++channel) {
        const T* entries = gradient.data + (i * gradient.channels + channel) * pixels;
        call.bias_gradient[channel] += sum_of<T>(entries, pixels);
      }
    }
    for (int64_t channel = begin; channel < end; ++channel) {
      const DirectRow<T> part(gradient, call.tiles, call.taps, image, channel);
      const int64_t place = image * image_size + channel * pixels;
      if (part.count == 0) {
        if (call.input_gradient != nullptr) {
          fill_channel(call.input_gradient + place, image_size, images, pixels, Vec<C>{});
        }
        continue;
      }
      for (int64_t i = 0; i < whole_vectors<C>(part.count); ++i) store(scratch + i * kW, Vec<C>{});
      part.for_each_tile([&](DirectTile<T>& tile, const Tile& shape, int64_t pixel, bool leaves) {
        if (call.input_gradient != nullptr) tile.result = call.input_gradient + place + pixel;
        tile.result_image = image_size;
        const int32_t *offsets = call.taps.offsets + part.begin,
                      *masks = call.taps.masks + part.begin;
        const T* input = call.input + place + pixel;
        const C* values = call.values + part.begin;
        if (!leaves) {
          return kernel_for<AddBothDirect<T>, kDirectBothVecs>(shape)(tile, input, values, offsets,
                                                                      masks, part.count, scratch);
        }
        for_each_vector<T>(tile, shape, [&](const DirectTile<T>& vector, int64_t by) {
          add_both_direct<T, true, 1, 1>(vector, input + by, values, offsets, masks, part.count,
                                         scratch);
        });
      });
      add_sums<C>(scratch, part.count, call.values_gradient + part.begin);
    }
  }
}

template <class T>
void scale_by_activation(const T* gradient, const T* saved, int64_t count, Activation activation,
                         T* result) {
  using C = Compute<T>;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store(result + i, activation_gradient<C>(load(gradient + i), load(saved + i), activation));
  }
  if (i == count) return;
  const int64_t left = count - i;
  store_first(result + i,
              activation_gradient<C>(load_partial(gradient + i, left),
                                     load_partial(saved + i, left), activation),
              left);
}

#define TSCNC_INSTANTIATE(T)                                                                 \
  template void direct_conv_product<T>(const DirectProduct<T>&, int64_t, int64_t);           \
  template int64_t direct_conv_backward_scratch<T>(int64_t);                                 \
  template void direct_conv_backward<T>(const DirectBackward<T>&, int64_t, int64_t, int64_t, \
                                        int64_t, Working<T>*);                               \
  template void scale_by_activation<T>(const T*, const T*, int64_t, Activation, T*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
