#include <type_traits>

#include "conv_sums.h"
#include "conv_tiles.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Weights ahead whose pixels are fetched.
constexpr int64_t kAhead = 8;

// Tiles of the input's gradient into `sums`, and into products[j], a vector of partial sums, what
// they contribute to the gradient of weight j. `held` is the input at a tile's place, zero behind
// its rows.
template <class C, int kRows, int kVecs>
void add_both(const C* values, const int32_t* offsets, int64_t count, const C* planes,
              int64_t next_row, const C* held, int64_t held_row, C* sums, int64_t sum_row,
              C* products, const Repeat& repeat) {
  constexpr int kW = kLanes<C>, kSize = kRows * kVecs;
  for (int64_t tile = 0; tile < repeat.count; ++tile) {
    Vec<C> sum[kSize], input[kSize];
#pragma GCC unroll 4
    for (int v = 0; v < kSize; ++v) {
      sum[v] = Vec<C>{};
      input[v] = load(held + v / kVecs * held_row + v % kVecs * kW);
    }
    for (int64_t j = 0; j < count; ++j) {
      __builtin_prefetch(planes + offsets[j + kAhead]);
      const Vec<C> value = broadcast(values[j]);
      const C* pixels = planes + offsets[j];
      Vec<C> product = load(products + j * kW);
#pragma GCC unroll 4
      for (int v = 0; v < kSize; ++v) {
        const Vec<C> gradient = load(pixels + v / kVecs * next_row + v % kVecs * kW);
        sum[v] += value * gradient;
        product += input[v] * gradient;
      }
      store(products + j * kW, product);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kSize; ++v) store(sums + v / kVecs * sum_row + v % kVecs * kW, sum[v]);
    planes += repeat.planes;
    held += repeat.held;
    sums += repeat.sums;
  }
}

template <class C>
struct AddBoth {
  template <int kRows, int kVecs>
  static constexpr auto get() {
    return &add_both<C, kRows, kVecs>;
  }
};

// Channels whose results are written together: as many as a vector holds where they are neighbours.
template <class T>
inline int64_t channels_together(const ConvBackward<T>& call) {
  return call.channel_stride == 1 && call.pixel_stride != 1 ? kLanes<T> : 1;
}

// Where a thread's scratch memory holds what.
template <class T>
struct Room {
  Compute<T>*packed, *held, *sums, *products;

  static int64_t packed_size(const ConvBackward<T>& call) {
    return call.gradient.channels * channel_size<T>(call.planes) + kConvTileVecs * kLanes<T>;
  }
  // A band of the input, or of its gradient.
  static int64_t band_size(const ConvBackward<T>& call) {
    const int64_t vecs = row_vecs<T>(call.planes, call.planes.width);
    return channels_together(call) * call.band * vecs * kLanes<T> + kConvTileVecs * kLanes<T>;
  }
  Room(const ConvBackward<T>& call, Compute<T>* scratch)
      : packed(scratch),
        held(packed + packed_size(call)),
        sums(held + band_size(call)),
        products(sums + band_size(call)) {}
};

// One part of a band of a group of images.
template <class T>
struct Band {
  const ConvPart<T>& part;
  int64_t image, present, first_row;
  int64_t height, rows, vecs;  // of the grid, of its strips, and vectors of one row
  Planes held;
};

// The results of one channel for a band, `held` being its input: where they belong if `target` says
// so, and else, all rows one after the other, in `sums`.
template <class T>
void both_gradients(const ConvBackward<T>& call, const Band<T>& band, int64_t channel,
                    const Target<T>* target, const Compute<T>* held, Compute<T>* sums,
                    const Room<T>& room) {
  using C = Compute<T>;
  constexpr int64_t kW = kLanes<T>;
  const ConvPart<T>& part = band.part;
  const int32_t begin = part.taps.bounds[channel], count = part.taps.bounds[channel + 1] - begin;
  const int64_t group = group_size<T>(call.planes), rows = band.rows, vecs = band.vecs;
  const int64_t held_row = band.held.width * group, next_row = call.planes.width * group;
  for (int64_t i = 0; i < whole_vectors<C>(count); ++i) store(room.products + i * kW, Vec<C>{});
  const auto add = [&](const Tile& strip, C* to, int64_t to_row, int64_t repeat) {
    for_each_tile<T>(strip, kConvBothVecs, [&](const Tile& tile) {
      kernel_for<AddBoth<C>, kConvBothVecs>(tile)(
          part.values + begin, part.taps.offsets + begin, count, room.packed + tile.first, next_row,
          held + tile.row * held_row + tile.column * kW, held_row, to + tile.column * kW, to_row,
          room.products, Repeat{repeat, rows * next_row, rows * to_row, rows * held_row});
    });
  };
  int64_t done = 0;
  if constexpr (std::is_same_v<T, C>) {
    const int64_t whole =
        target == nullptr ? 0 : whole_strips(call.planes, rows, band.height, part.width, *target);
    const int64_t repeat = vecs <= kConvBothVecs ? whole : 1;
    for (int64_t strip = 0; strip < whole; strip += repeat) {
      const int64_t row = strip * rows;
      add(Tile{rows, vecs, row, 0, row * next_row}, target->data + row * target->row_stride,
          target->row_stride, repeat);
    }
    done = whole * rows;
  }
  for_each_rows<T>(call.planes, done, band.height, part.width, rows, [&](const Tile& strip) {
    add(strip, target == nullptr ? sums + strip.row * vecs * kW : sums, vecs * kW, 1);
    if (target == nullptr) return;
    unpack_tile<T>(call.planes, strip, band.height, part.width, band.present, sums, 1, *target);
  });
  add_sums<C>(room.products, count, call.values_gradient + begin);
}

// The channels [begin, end), at most channels_together of them, of one part for a band.
template <class T>
void backward_band(const ConvBackward<T>& call, const Band<T>& band, int64_t begin, int64_t end,
                   const Room<T>& room) {
  using C = Compute<T>;
  const ConvPart<T>& part = band.part;
  const Target<T> target{call.input_gradient + part.output_offset + band.image * call.image_stride +
                             begin * call.channel_stride + band.first_row * call.row_stride,
                         call.image_stride, call.channel_stride, call.row_stride,
                         call.pixel_stride};
  const int64_t apart = channels_together(call);
  if (apart == 1 && part.taps.bounds[begin] == part.taps.bounds[end]) {
    return fill<T>(target, band.present, band.height, part.width, Vec<C>{});
  }
  pack_planes<T>(call.input, band.held, band.image, band.present, band.first_row, begin, end,
                 room.held);
  const int64_t size = band.height * band.vecs * kLanes<T>;
  for (int64_t channel = begin; channel < end; ++channel) {
    both_gradients<T>(call, band, channel, apart == 1 ? &target : nullptr,
                      room.held + (channel - begin) * channel_size<T>(band.held),
                      room.sums + (channel - begin) * size, room);
  }
  if (apart == 1) return;
  unpack_tile<T>(call.planes, Tile{band.height, band.vecs, 0, 0, 0}, band.height, part.width,
                 band.present, room.sums, end - begin, target);
}

// Adds rows [from, to) of the planes of the output's gradient.
template <class T>
void add_to_bias(const ConvBackward<T>& call, const Compute<T>* packed, int64_t from, int64_t to,
                 int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t row = call.planes.width * group_size<T>(call.planes), last = to * row;
  for (int64_t channel = begin; channel < end; ++channel) {
    const C* entries = packed + channel * channel_size<T>(call.planes);
    Vec<C> sum[4] = {};
    int64_t i = from * row;
    for (; i + 4 * kLanes<T> <= last; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(entries + i + k * kLanes<T>);
    }
    for (; i + kLanes<T> <= last; i += kLanes<T>) sum[0] += load(entries + i);
    if (i < last) sum[1] += load_partial(entries + i, last - i);
    call.bias_gradient[channel] += sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

}  // namespace

template <class T>
int64_t masked_conv2d_backward_scratch(const ConvBackward<T>& call, int64_t most) {
  return Room<T>::packed_size(call) + 2 * Room<T>::band_size(call) +
         whole_vectors<Compute<T>>(most) * kLanes<T>;
}

template <class T>
void masked_conv2d_backward(const ConvBackward<T>& call, int64_t begin, int64_t end,
                            int64_t bias_begin, int64_t bias_end, Working<T>* scratch) {
  const Room<T> room(call, scratch);
  const int64_t group = group_size<T>(call.planes), together = channels_together(call);
  for (int64_t image = 0; image < call.gradient.count; image += group) {
    const int64_t left = call.gradient.count - image, present = left < group ? left : group;
    int64_t summed = 0;  // rows of the output's gradient that are in the bias's
    for (int64_t first_row = 0; first_row < call.height; first_row += call.band) {
      pack_used<T>(call.gradient, call.planes, image, present, first_row, call.used, room.packed);
      const int64_t top = first_row - call.planes.top, rows = call.planes.rows;
      const int64_t end_row = top + rows < call.gradient.height ? top + rows : call.gradient.height;
      if (call.bias_gradient != nullptr && end_row > summed) {
        add_to_bias<T>(call, room.packed, summed - top, end_row - top, bias_begin, bias_end);
        summed = end_row;
      }
      for (int64_t p = 0; p < call.part_count; ++p) {
        const ConvPart<T>& part = call.parts[p];
        const int64_t below = part.height - first_row,
                      height = below < call.band ? below : call.band;
        if (height <= 0 || part.width <= 0) continue;
        const int64_t vecs = row_vecs<T>(call.planes, part.width);
        const Planes held{height,
                          vecs * (kLanes<T> / group),
                          0,
                          0,
                          call.stride_h,
                          call.stride_w,
                          1,
                          1,
                          &part.phase_h,
                          &part.phase_w,
                          call.planes.interleaved};
        const Band<T> band{part,      image,  present,
                           first_row, height, strip_rows<T>(call.planes, part.width, kConvBothVecs),
                           vecs,      held};
        for (int64_t row = begin; row < end; row += together) {
          backward_band<T>(call, band, row, end - row < together ? end : row + together, room);
        }
      }
    }
  }
}

#define TSCNC_INSTANTIATE(T)                                                                 \
  template int64_t masked_conv2d_backward_scratch<T>(const ConvBackward<T>&, int64_t);       \
  template void masked_conv2d_backward<T>(const ConvBackward<T>&, int64_t, int64_t, int64_t, \
                                          int64_t, Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
