// What masked_conv2d's forward and backward ops share: checks, plans and the parallel product.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "conv_taps.h"
#include "dtype_dispatch.h"
#include "kept_values.h"
#include "sparse_index.h"
#include "torch_parallel.h"

namespace tscnc {

constexpr char kConv[] = "masked_conv2d";
// Multiply-adds that are worth a second thread.
constexpr int64_t kConvParallelWork = 1 << 18;

// One convolution: kernel, stride, padding (top, bottom, left, right), dilation and groups.
inline ConvShape conv_shape(const Tensor& input, const SparseRows& structure,
                            const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(geometry.size() == 11, kConv, ": expected 11 numbers of geometry, got ",
                  geometry.size());
  const auto& g = geometry;
  ConvShape shape{input.size(1),
                  structure.rows,
                  g[10],
                  {input.size(2), g[0], g[2], g[4], g[5], g[8]},
                  {input.size(3), g[1], g[3], g[6], g[7], g[9]}};
  for (const ConvAxis& axis : {shape.height, shape.width}) {
    STD_TORCH_CHECK(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.before >= 0 &&
                        axis.after >= 0 &&
                        axis.size + axis.before + axis.after > axis.dilation * (axis.kernel - 1),
                    kConv, ": expected a kernel that fits the padded input");
  }
  STD_TORCH_CHECK(shape.groups > 0 && shape.in_channels % shape.groups == 0 &&
                      shape.out_channels % shape.groups == 0 &&
                      structure.width == shape.group_in() * g[0] * g[1],
                  kConv, ": expected channels that fit the groups and the pattern");
  return shape;
}

// The only reading of a pattern's index; what else is needed is derived from it (conv_taps.h).
inline SparseRows kept_rows(const Tensor& pointers, const Tensor& columns, int64_t width) {
  const int64_t kept = columns.numel();
  const int32_t* begin = pointer_data(kConv, pointers, kept, "row_pointers");
  STD_TORCH_CHECK(pointers.numel() >= 2, kConv, ": expected row_pointers of at least one row");
  return {begin, bounded_index(kConv, columns, kept, width, "columns"), pointers.numel() - 1,
          width};
}

inline void check_images(const Tensor& tensor, const Tensor& like, int64_t channels, int64_t height,
                         int64_t width, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.size(0) == like.size(0) &&
                      tensor.size(1) == channels && tensor.size(2) == height &&
                      tensor.size(3) == width && tensor.scalar_type() == like.scalar_type(),
                  kConv, ": expected ", name, " to be ", like.size(0), " x ", channels, " x ",
                  height, " x ", width, " on the CPU and of the input's dtype");
}

template <class T>
Images<T> images(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t d = 0; d < 4; ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return {data<T>(tensor),  tensor.size(0),   tensor.size(1),   tensor.size(2),
          tensor.size(3),   tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3), extent,           nullptr,          Activation::none};
}

inline Tensor new_images(const Tensor& like, int64_t count, int64_t channels, int64_t height,
                         int64_t width, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, {count, channels, height, width});
  const Tensor pixels = torch::stable::new_empty(like, {count, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(pixels, 1, 3), 2, 3);
}

// Working memory of the calling thread for what a call derives from the pattern.
inline Scratch& offset_memory() {
  thread_local Scratch memory;
  return memory;
}

inline Scratch& value_memory() {
  thread_local Scratch memory;
  return memory;
}

// One parallel region: bands of groups of images, and also ranges of channels where there are fewer
// bands than threads.
template <class T>
void run_product(ConvProduct<T> call) {
  if (call.input.count == 0) return;
  const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
  const int64_t group = call.planes.interleaved ? lanes : 1;
  const int64_t items =
      (call.input.count + group - 1) / group * ((call.height + call.band - 1) / call.band);
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits = items < threads ? (threads + items - 1) / items : 1;
  int64_t kept = 0;
  const Taps& first = call.parts[0].taps;
  for (int64_t p = 0; p < call.part_count; ++p) {
    const Taps& taps = call.parts[p].taps;
    kept += taps.bounds[taps.rows * taps.blocks] - taps.bounds[0];
  }
  const int64_t work = (kept + call.input.channels) * call.band * call.planes.width * group;
  const auto kernel = TSCNC_SELECT(masked_conv2d_product<T>);
  const int64_t size =
      TSCNC_SELECT(masked_conv2d_scratch<T>)(call.planes, call.input.channels, first.rows, 0);
  torch::stable::parallel_for(0, items * call.row_splits,
                              std::max<int64_t>(1, kConvParallelWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                kernel(call, begin, end,
                                       thread_scratch().reserve<Working<T>>(size));
                              });
}

template <class T>
struct ForwardPlan {
  OwnedPlanes planes;
  OwnedTaps taps;
  std::vector<uint8_t> used;

  ForwardPlan(const ConvShape& shape, const SparseRows& structure, bool interleaved) {
    const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
    const ConvAxis &height = shape.height, &width = shape.width;
    const AxisTaps h = forward_axis(height), w = forward_axis(width);
    used = used_inputs(shape, structure);
    const Grid grid{shape.in_channels, std::count(used.begin(), used.end(), 1),
                    height.output(),   width.output(),
                    height.before,     width.before,
                    height.stride,     width.stride};
    planes = planes_for(kConv, grid, h, w, interleaved, lanes, sizeof(Working<T>));
    const int64_t bytes =
        tile_bytes(planes.get(), h.reach, w.reach, grid.width, lanes, sizeof(Working<T>));
    const ChannelBlocks blocks =
        channel_blocks(shape.group_in(), structure.rows, structure.pointers[structure.rows], bytes);
    taps = forward_taps(shape, structure, h, w, planes.get(), lanes, blocks, offset_memory());
  }
};

// Rows that a product computes together, tile by tile: all of them where they reuse a tile's pixels
// often enough to want them in the first-level cache, else one after the other, or as many as
// channels-last results are written in one vector.
inline int64_t together(const SparseRows& structure, const OwnedTaps& taps, int64_t parts,
                        bool channels_last) {
  constexpr int64_t kFewTaps = 16, kNeighbours = 16;
  const int64_t kept = structure.pointers[structure.rows];
  if (taps.blocks > 1 || kept > kFewTaps * taps.rows * parts) return taps.rows;
  return channels_last ? kNeighbours : 1;
}

// The algorithms' codes: images packed one after the other, packed together, and not at all.
enum class ConvAlgorithm : int64_t { plane, batch, direct };

inline ConvAlgorithm conv_algorithm(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(ConvAlgorithm::direct), kConv,
                  ": expected an algorithm code from 0 to 2, got ", code);
  return static_cast<ConvAlgorithm>(code);
}

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::gelu), kConv,
                  ": expected an activation code from 0 to 2, got ", code);
  return static_cast<Activation>(code);
}

}  // namespace tscnc
