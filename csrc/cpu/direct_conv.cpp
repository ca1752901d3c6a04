#include "direct_conv.h"

#include <utility>

#include "conv_sums.h"
#include "direct_tiles.h"

namespace tscnc::TSCNC_ISA {
namespace {

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
