// Convolutions of stride 1 whose results have their images' size, on contiguous images as they lie
// in memory: nothing is packed, which few kept weights would not pay for.
//
// A channel is one run of pixels. For the result at pixel p, a weight meets pixel p + shift of a
// channel, unless that is beyond the image's border, where a mask makes it zero.
#pragma once

#include <cstdint>
#include <type_traits>

#include "include/activation.h"
#include "isa.h"
#include "masked_linear.h"

namespace tscnc {

// The unsigned integer as wide as an arithmetic type.
template <class C>
using MaskBits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;

// (count, channels, pixels) contiguous entries.
template <class T>
struct Channels {
  const T* data;
  int64_t count, channels, pixels;
};

// The cut of a channel's pixels into tiles of `vecs` vectors, the last perhaps shorter, and what
// lies inside of the image for each: starts[tile] leads to one mask of a whole tile per position of
// the kernel, and behind them one of the pixels that the channel has.
template <class C>
struct DirectTiles {
  int64_t vecs, count;
  const int32_t* starts;
  const MaskBits<C>* masks;
  int64_t positions;  // of the kernel
  int64_t together;   // images computed together; more than 1 only if one tile is a whole channel
};

// The kept weights that result in channel r are bounds[r] to bounds[r + 1], in the order of the
// channels that they read: offsets from an image's first pixel to the one that result 0 meets, and
// where in a tile's masks a weight's own begins. No shift is longer than `reach`.
struct DirectTaps {
  const int32_t *bounds, *offsets, *masks;
  int64_t rows, reach;
};

// Every row of the taps gives one channel of results act(sum + bias).
template <class T>
struct DirectProduct {
  Channels<T> input;
  DirectTiles<Working<T>> tiles;
  DirectTaps taps;
  const Working<T>* values;
  const Working<T>* bias;  // (rows,) or null
  Activation activation;
  T* output;
  T* preactivation;  // the same without the activation, or null
  int64_t row_splits;
};

// The gradients of the input, whose channels are the taps' rows, and of the weight, in the order of
// the taps, from one pass over the output's.
template <class T>
struct DirectBackward {
  Channels<T> gradient;  // of the output
  DirectTiles<Working<T>> tiles;
  DirectTaps taps;
  const Working<T>* values;
  const T* input;
  T* input_gradient;            // or null
  Working<T>* values_gradient;  // (nnz,), added to
  Working<T>* bias_gradient;    // (gradient.channels,), added to, or null
};

// Vectors of a tile of results, and of one of both gradients, whose input is held too.
constexpr int64_t kDirectVecs = 8, kDirectBothVecs = 4;

// The items [begin, end) of a product: item (images computed together, range of rows), the last
// running fastest.
TSCNC_PER_ISA(template <class T>
              void direct_conv_product(const DirectProduct<T>& call, int64_t begin, int64_t end);)

// Elements of Working<T> that one thread needs for a channel of at most `most` weights.
TSCNC_PER_ISA(template <class T> int64_t direct_conv_backward_scratch(int64_t most);)

// The input's channels [begin, end), with the gradients of their weights, and the bias's entries
// [bias_begin, bias_end), over all images in order.
TSCNC_PER_ISA(template <class T>
              void direct_conv_backward(const DirectBackward<T>& call, int64_t begin, int64_t end,
                                        int64_t bias_begin, int64_t bias_end, Working<T>* scratch);)

// result[i] = gradient[i] times the activation's derivative at saved[i].
TSCNC_PER_ISA(template <class T> void scale_by_activation(const T* gradient, const T* saved,
                                                          int64_t count, Activation activation,
                                                          T* result);)

}  // namespace tscnc
