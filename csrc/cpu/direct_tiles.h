// Tiles of a convolution on images as they lie in memory: kernels for one shape of tile.
#pragma once

#include "conv_tiles.h"
#include "direct_conv.h"

namespace tscnc::TSCNC_ISA {

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
[[gnu::noinline]] inline void activate_sums(C* sums, int64_t vecs, Activation activation) {
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

}  // namespace tscnc::TSCNC_ISA
