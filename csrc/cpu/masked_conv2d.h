#pragma once

#include <cstdint>

#include "include/activation.h"
#include "isa.h"
#include "masked_linear.h"

namespace tscnc {

// A (count, channels, height, width) tensor with any strides. Where `saved` is not null, every
// entry is multiplied by the activation's derivative at the same place of `saved`, which has the
// same strides.
template <class T>
struct Images {
  const T* data;
  int64_t count, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
  int64_t extent;  // elements from the first to behind the last
  const T* saved;
  Activation activation;
};

// How images are packed. The image, padded by `top` and `left`, is cut into phases: plane (a, b) of
// a channel holds the padded pixels (i * stride_h + phase_h[a], j * stride_w + phase_w[b]). So one
// step of the result's grid is one pixel of a plane whatever the stride.
struct Planes {
  int64_t rows, width;  // pixels of one plane
  int64_t top, left;
  int64_t stride_h, stride_w;
  int64_t phases_h, phases_w;
  const int32_t *phase_h, *phase_w;
  bool interleaved;  // a pixel is one vector of images, else one element of one image
};

// The kept weights, cut into blocks of channels whose planes fit a first-level cache: those of row
// r in block b are bounds[b * rows + r] to bounds[b * rows + r + 1]. A weight and the pixel with
// element p of the packed planes meet at element p + offset.
struct Taps {
  const int32_t* bounds;
  const int32_t* offsets;
  int64_t rows, blocks;
};

// One unit-stride convolution: a grid of results from `output_offset` on. The input's gradient has
// one part per phase of the stride; its results are those of rows phase_h, phase_h + stride, ...
template <class T>
struct ConvPart {
  Taps taps;
  const Working<T>* values;
  int64_t height, width;
  int64_t output_offset;
  int32_t phase_h, phase_w;
};

// Every row of every part's taps gives one channel of results act(sum + bias). The strides are the
// results'; grids of a height more than `band` are computed in bands of that many rows.
template <class T>
struct ConvProduct {
  Images<T> input;
  const uint8_t* used;  // per channel of the input, whether some weight reads it; null: all
  Planes planes;
  const ConvPart<T>* parts;
  int64_t part_count;
  int64_t height, band;
  const Working<T>* bias;  // (rows,) or null
  Activation activation;
  T* output;
  T* preactivation;  // the same without the activation, or null
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
  int64_t row_splits;
  int64_t together;  // rows whose results are computed tile by tile together
};

// values_gradient[j] += the sum over images and pixels of gradient times the input that weight j
// meets; bias_gradient[r] += the sum of gradient's channel r.
template <class T>
struct ConvWeightGradient {
  Images<T> input;
  const uint8_t* used;  // per channel of the input, whether some weight reads it; null: all
  Planes planes;
  Taps taps;
  Images<T> gradient;
  int64_t band;
  Working<T>* values_gradient;  // (nnz,) or null
  Working<T>* bias_gradient;    // (rows,) or null
};

// The gradients of the input and of the weight from one pass over the output's gradient: in the
// order of the input's gradient, a weight multiplies the same pixels into the sums that it belongs
// to and, times the input at their place, into its own gradient. Taps have one block.
template <class T>
struct ConvBackward {
  Images<T> gradient;   // of the output
  const uint8_t* used;  // per channel of it, whether it is needed; null: all
  Planes planes;
  const ConvPart<T>* parts;
  int64_t part_count;
  int64_t height, band;
  Images<T> input;
  int64_t stride_h, stride_w;
  T* input_gradient;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // of one part
  Working<T>* values_gradient;  // (nnz,) in the order of the taps, added to
  Working<T>* bias_gradient;    // (rows,), added to, or null
};

// Vectors of a tile of ConvBackward: sums and held input fill half the registers.
constexpr int64_t kConvBothVecs = 4;
// Vectors of a tile of results: with them, the registers are half full.
constexpr int64_t kConvTileVecs = 8;
// Vectors of gradients that a weight's gradient is summed over at once.
constexpr int64_t kConvRunVecs = 32;

// Images packed together where planes are interleaved.
TSCNC_PER_ISA(template <class T> int64_t masked_conv2d_lanes();)

// Elements of Working<T> that one thread needs for `rows` rows of a product or gradient.
TSCNC_PER_ISA(template <class T> int64_t masked_conv2d_scratch(const Planes& planes,
                                                               int64_t channels, int64_t rows,
                                                               int64_t band);)

// The items [begin, end) of a product: item (group of images, band, range of rows), the last
// running fastest, so that neighbours share the packed planes.
TSCNC_PER_ISA(template <class T> void masked_conv2d_product(const ConvProduct<T>& call,
                                                            int64_t begin, int64_t end,
                                                            Working<T>* scratch);)

// The rows [begin, end) of a weight gradient, over all images in order.
TSCNC_PER_ISA(template <class T>
              void masked_conv2d_weight_gradient(const ConvWeightGradient<T>& call, int64_t begin,
                                                 int64_t end, Working<T>* scratch);)

// Elements of Working<T> that one thread needs for a channel of at most `most` weights.
TSCNC_PER_ISA(template <class T>
              int64_t masked_conv2d_backward_scratch(const ConvBackward<T>& call, int64_t most);)

// The input's channels [begin, end), with the gradients of their weights, and the bias's entries
// [bias_begin, bias_end), over all images in order.
TSCNC_PER_ISA(template <class T> void masked_conv2d_backward(const ConvBackward<T>& call,
                                                             int64_t begin, int64_t end,
                                                             int64_t bias_begin, int64_t bias_end,
                                                             Working<T>* scratch);)

}  // namespace tscnc
