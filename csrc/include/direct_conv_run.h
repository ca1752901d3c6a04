// masked_conv2d on images as they lie in memory (cpu/direct_conv.h): plans and parallel products.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "conv_run.h"
#include "cpu/direct_conv.h"

namespace tscnc {

// One dimension of a kernel of stride 1: by how many pixels its positions are shifted.
inline std::vector<int64_t> shifts(const ConvAxis& axis, int64_t sign) {
  std::vector<int64_t> result;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    result.push_back(sign * (k * axis.dilation - axis.before));
  }
  return result;
}

template <class C>
struct OwnedTiles {
  int64_t vecs, count, positions, together;
  std::vector<int32_t> starts;
  std::vector<MaskBits<C>> masks;

  DirectTiles<C> get() const {
    return {vecs, count, starts.data(), masks.data(), positions, together};
  }
};

// Vectors of a tile, at most `most` of them: such that tiles inside of the image have the same
// masks, where that is possible, else such that tiles are about equal.
inline int64_t direct_tile_vecs(int64_t width, int64_t pixels, int64_t lanes, int64_t most) {
  const int64_t all = (pixels + lanes - 1) / lanes;
  for (int64_t vecs = most; vecs > most / 2 && vecs <= all; --vecs) {
    if (vecs * lanes % width == 0 || width % (vecs * lanes) == 0) return vecs;
  }
  const int64_t cuts = (all + most - 1) / most;
  return (all + cuts - 1) / cuts;
}

// The tiles of a channel of height x width pixels, and their masks for shifts in both dimensions.
template <class C>
OwnedTiles<C> direct_tiles(int64_t height, int64_t width, const std::vector<int64_t>& down,
                           const std::vector<int64_t>& right, int64_t lanes, int64_t most) {
  const int64_t pixels = height * width;
  OwnedTiles<C> tiles{direct_tile_vecs(width, pixels, lanes, most),
                      0,
                      static_cast<int64_t>(down.size() * right.size()),
                      1,
                      {},
                      {}};
  const int64_t length = tiles.vecs * lanes;
  tiles.count = (pixels + length - 1) / length;
  if (tiles.count == 1) tiles.together = most / tiles.vecs;
  const auto [up, below] = std::minmax_element(down.begin(), down.end());
  // Tiles that shifts do not lead above or below the image have the masks of those at their column.
  std::vector<int32_t> inside(static_cast<size_t>(width), -1);
  for (int64_t begin = 0; begin < pixels; begin += length) {
    const int64_t first = begin / width, last = (begin + length - 1) / width;
    const bool interior = first + *up >= 0 && last + *below < height;
    int32_t& known = inside[static_cast<size_t>(begin % width)];
    if (interior && known >= 0) {
      tiles.starts.push_back(known);
      continue;
    }
    tiles.starts.push_back(static_cast<int32_t>(tiles.masks.size()));
    if (interior) known = tiles.starts.back();
    for (const int64_t dh : down) {
      for (const int64_t dw : right) {
        for (int64_t p = begin; p < begin + length; ++p) {
          const int64_t h = p / width + dh, w = p % width + dw;
          const bool meets = p < pixels && h >= 0 && h < height && w >= 0 && w < width;
          tiles.masks.push_back(meets ? ~MaskBits<C>(0) : 0);
        }
      }
    }
  }
  return tiles;
}

// Kept weights as taps on whole images: per column of the pattern, its shift and mask.
struct DirectColumns {
  std::vector<int32_t> shift, mask;
  int64_t reach;
  static constexpr int64_t kBehind = 16;  // entries that kernels look up behind the last

  DirectColumns(const ConvShape& shape, const std::vector<int64_t>& down,
                const std::vector<int64_t>& right, int64_t mask_size)
      : reach(0) {
    for (const int64_t dh : down) {
      for (const int64_t dw : right) {
        const int64_t step = dh * shape.width.size + dw;
        mask.push_back(static_cast<int32_t>(static_cast<int64_t>(shift.size()) * mask_size));
        shift.push_back(static_cast<int32_t>(step));
        reach = std::max(reach, step < 0 ? -step : step);
      }
    }
  }
};

// Where entries of a row-ordered pattern end up when put in the order of the channels they read.
inline void by_channel(const ConvShape& shape, const SparseRows& structure,
                       std::vector<int32_t>& bounds, int32_t* places) {
  const auto kernel = static_cast<int32_t>(shape.height.kernel * shape.width.kernel);
  const auto for_entries = [&](const auto& function) {
    for (int64_t row = 0; row < structure.rows; ++row) {
      const int64_t first = row / shape.group_out() * shape.group_in();
      for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
        function(j, static_cast<size_t>(first + structure.columns[j] / kernel));
      }
    }
  };
  bounds.assign(static_cast<size_t>(shape.in_channels + 1), 0);
  for_entries([&](int32_t, size_t channel) { ++bounds[channel + 1]; });
  sum_up(bounds);
  std::vector<int32_t> next(bounds.begin(), bounds.end() - 1);
  for_entries([&](int32_t j, size_t channel) { places[j] = next[channel]++; });
}

// A convolution and its input's gradient, which is one too, with shifts of the other sign.
template <class T>
struct DirectPlan {
  OwnedTiles<Working<T>> tiles;
  std::vector<int32_t> bounds;
  DirectTaps taps;
  const Working<T>* values;
  const int32_t* places;  // of the pattern's entries among the taps; null: their order

  DirectPlan(const ConvShape& shape, const SparseRows& structure, const Working<T>* kept,
             bool transposed, int64_t most)
      : values(kept), places(nullptr) {
    const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)(), sign = transposed ? -1 : 1;
    const auto down = shifts(shape.height, sign), right = shifts(shape.width, sign);
    tiles = direct_tiles<Working<T>>(shape.height.size, shape.width.size, down, right, lanes, most);
    const DirectColumns columns(shape, down, right, tiles.vecs * lanes);
    const int64_t pixels = shape.height.size * shape.width.size;
    const int64_t nnz = structure.pointers[structure.rows];
    const int64_t kernel = static_cast<int64_t>(columns.shift.size());
    constexpr int64_t kBehind = DirectColumns::kBehind;
    int32_t* offsets = offset_memory().reserve<int32_t>(3 * (nnz + kBehind));
    int32_t *masks = offsets + nnz + kBehind, *order = masks + nnz + kBehind;
    std::fill(offsets + nnz, masks, 0);
    if (transposed) {
      by_channel(shape, structure, bounds, order);
      auto* ordered = value_memory().reserve<Working<T>>(nnz + 1);
      for (int64_t j = 0; j < nnz; ++j) ordered[order[j]] = kept[j];
      values = ordered;
      places = order;
    } else {
      bounds.assign(structure.pointers, structure.pointers + structure.rows + 1);
    }
    for (int64_t row = 0; row < structure.rows; ++row) {
      const int64_t first = row / shape.group_out() * shape.group_in();
      for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
        const int64_t column = structure.columns[j], channel = first + column / kernel;
        const auto position = static_cast<size_t>(column % kernel);
        const int32_t place = transposed ? order[j] : j;
        offsets[place] =
            static_cast<int32_t>((transposed ? row : channel) * pixels) + columns.shift[position];
        masks[place] = columns.mask[position];
      }
    }
    taps = {bounds.data(), offsets, masks, static_cast<int64_t>(bounds.size()) - 1, columns.reach};
  }
};

// Raises where "direct" cannot compute a convolution.
inline void check_direct(const ConvShape& shape) {
  const auto keeps = [](const ConvAxis& axis) {
    return axis.stride == 1 && axis.output() == axis.size;
  };
  STD_TORCH_CHECK(keeps(shape.height) && keeps(shape.width), kConv,
                  ": expected stride 1 and results of the input's size for algorithm='direct'");
  const double elements = static_cast<double>(std::max(shape.in_channels, shape.out_channels)) *
                          (shape.height.size + shape.height.kernel * shape.height.dilation) *
                          shape.width.size;
  STD_TORCH_CHECK(elements < 2147483648.0, kConv, ": the input is too large for 32-bit offsets (",
                  elements, " elements); use algorithm='dense'");
}

template <class T>
Channels<T> channels(const Tensor& images) {
  return {data<T>(images), images.size(0), images.size(1), images.size(2) * images.size(3)};
}

// One parallel region over groups of images, and ranges of rows where there are too few of them.
template <class T>
void run_direct(DirectProduct<T> call) {
  const int64_t together = call.tiles.together, rows = call.taps.rows;
  const int64_t groups = (call.input.count + together - 1) / together;
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits =
      groups < threads ? std::min(rows, (threads + groups - 1) / std::max<int64_t>(1, groups)) : 1;
  const int64_t work = (call.taps.bounds[rows] + rows) * call.input.pixels * together;
  const auto kernel = TSCNC_SELECT(direct_conv_product<T>);
  torch::stable::parallel_for(0, groups * call.row_splits,
                              std::max<int64_t>(1, kConvParallelWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// Ranges of the input's channels with about equal numbers of kept entries.
template <class T>
void run_direct_backward(const DirectBackward<T>& call) {
  const DirectTaps& taps = call.taps;
  const int64_t kept = taps.bounds[taps.rows];
  const int64_t work = kept * call.gradient.count * call.gradient.pixels;
  const int64_t parts =
      std::clamp<int64_t>(work / kConvParallelWork, 1, torch::stable::get_num_threads());
  int64_t most = 0;
  for (int64_t row = 0; row < taps.rows; ++row) {
    most = std::max<int64_t>(most, taps.bounds[row + 1] - taps.bounds[row]);
  }
  const auto split = [&](int64_t part) {
    if (part == parts) return taps.rows;
    const int32_t* end = taps.bounds + taps.rows;
    return static_cast<int64_t>(std::lower_bound(taps.bounds, end, kept * part / parts) -
                                taps.bounds);
  };
  const auto kernel = TSCNC_SELECT(direct_conv_backward<T>);
  const int64_t size = TSCNC_SELECT(direct_conv_backward_scratch<T>)(most);
  const int64_t outputs = call.gradient.channels;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    kernel(call, split(begin), split(end), outputs * begin / parts, outputs * end / parts,
           thread_scratch().reserve<Working<T>>(size));
  });
}

// The output's gradient times the activation's derivative, contiguous.
template <class T>
Tensor scaled_gradient(const Tensor& gradient, const Tensor& saved, Activation activation) {
  const Tensor plain = torch::stable::contiguous(gradient);
  if (activation == Activation::none) return plain;
  const Tensor at = torch::stable::contiguous(saved), result = torch::stable::empty_like(plain);
  const auto kernel = TSCNC_SELECT(scale_by_activation<T>);
  torch::stable::parallel_for(0, plain.numel(), kConvParallelWork, [&](int64_t begin, int64_t end) {
    kernel(data<T>(plain) + begin, data<T>(at) + begin, end - begin, activation,
           mutable_data<T>(result) + begin);
  });
  return result;
}

inline Tensor in_layout(const Tensor& images, bool channels_last) {
  if (!channels_last || images.numel() == 0) return images;
  Tensor result =
      new_images(images, images.size(0), images.size(1), images.size(2), images.size(3), true);
  return torch::stable::copy_(result, images);
}

// act(sum + bias) of all taps, and where it is wanted the same without the activation.
template <class T>
std::tuple<Tensor, Tensor> direct_product(const DirectPlan<T>& plan, const Tensor& input,
                                          const Working<T>* bias, Activation activation,
                                          bool save_preactivation) {
  const auto images = [&](int64_t count) {
    return torch::stable::new_empty(input, {count, plan.taps.rows, input.size(2), input.size(3)});
  };
  const Tensor output = images(input.size(0));
  const Tensor preactivation = images(save_preactivation ? input.size(0) : 0);
  run_direct<T>({channels<T>(input), plan.tiles.get(), plan.taps, plan.values, bias, activation,
                 mutable_data<T>(output),
                 save_preactivation ? mutable_data<T>(preactivation) : nullptr, 1});
  return {output, preactivation};
}

// Of the gradients, those that `needs` says (input, weight, bias); the others come back empty.
template <class T>
std::tuple<Tensor, Tensor, Tensor> direct_gradients(const ConvShape& shape,
                                                    const SparseRows& structure,
                                                    const Tensor& weight, const Tensor& gradient,
                                                    const Tensor& input, bool needs_input,
                                                    bool needs_weight, bool needs_bias) {
  const Tensor values = kept_values<T>(kConv, weight, structure);
  const ScalarType dtype = input.scalar_type();
  Tensor nothing = torch::stable::new_empty(input, {0});
  if (!needs_weight && !needs_bias) {
    const DirectPlan<T> plan(shape, structure, data<Working<T>>(values), true, kDirectVecs);
    auto [result, none] = direct_product(plan, gradient, nullptr, Activation::none, false);
    return {result, nothing, nothing};
  }
  const DirectPlan<T> plan(shape, structure, data<Working<T>>(values), true, kDirectBothVecs);
  const int64_t kept = values.numel();
  const Tensor ordered = torch::stable::new_zeros(input, {kept}, working_type<T>());
  Tensor bias =
      torch::stable::new_zeros(input, {needs_bias ? structure.rows : 0}, working_type<T>());
  Tensor result = nothing;
  if (needs_input) result = torch::stable::empty_like(input);
  run_direct_backward<T>({channels<T>(gradient), plan.tiles.get(), plan.taps, plan.values,
                          data<T>(input), needs_input ? mutable_data<T>(result) : nullptr,
                          mutable_data<Working<T>>(ordered),
                          needs_bias ? mutable_data<Working<T>>(bias) : nullptr});
  bias = in_dtype(bias, dtype);
  if (!needs_weight) return {result, nothing, bias};
  Tensor sums = torch::stable::new_empty(input, {kept}, working_type<T>());
  const auto* source = data<Working<T>>(ordered);
  auto* target = mutable_data<Working<T>>(sums);
  for (int64_t j = 0; j < kept; ++j) target[j] = source[plan.places[j]];
  return {result, like_weight<T>(in_dtype(sums, dtype), weight, structure), bias};
}

}  // namespace tscnc
