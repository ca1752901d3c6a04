// masked_conv2d on the CPU; Python side and formula: tscnc_kernels/ops/masked_conv2d.py.
#include "cpu/masked_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "conv_taps.h"
#include "dtype_dispatch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "masked_conv2d";
// Multiply-adds that are worth a second thread.
constexpr int64_t kParallelWork = 1 << 18;
// What a band of packed planes should leave of a second-level cache.
constexpr int64_t kPackedBytes = 1024 * 1024;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
constexpr ScalarType working_type() {
  return sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;
}

// One convolution: kernel, stride, padding (top, bottom, left, right), dilation and groups.
ConvShape conv_shape(const Tensor& input, const SparseRows& structure,
                     const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(geometry.size() == 11, kOp, ": expected 11 numbers of geometry, got ",
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
                    kOp, ": expected a kernel that fits the padded input");
  }
  STD_TORCH_CHECK(shape.groups > 0 && shape.in_channels % shape.groups == 0 &&
                      shape.out_channels % shape.groups == 0 &&
                      structure.width == shape.group_in() * g[0] * g[1],
                  kOp, ": expected channels that fit the groups and the pattern");
  return shape;
}

// The only reading of a pattern's index; what else is needed is derived from it (conv_taps.h).
SparseRows kept_rows(const Tensor& pointers, const Tensor& columns, int64_t width) {
  const int64_t kept = columns.numel();
  const int32_t* begin = pointer_data(kOp, pointers, kept, "row_pointers");
  STD_TORCH_CHECK(pointers.numel() >= 2, kOp, ": expected row_pointers of at least one row");
  return {begin, bounded_index(kOp, columns, kept, width, "columns"), pointers.numel() - 1, width};
}

void check_images(const Tensor& tensor, const Tensor& like, int64_t channels, int64_t height,
                  int64_t width, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.size(0) == like.size(0) &&
                      tensor.size(1) == channels && tensor.size(2) == height &&
                      tensor.size(3) == width && tensor.scalar_type() == like.scalar_type(),
                  kOp, ": expected ", name, " to be ", like.size(0), " x ", channels, " x ", height,
                  " x ", width, " on the CPU and of the input's dtype");
}

template <class T>
Images<T> images(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t d = 0; d < 4; ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return {data<T>(tensor),  tensor.size(0),   tensor.size(1),   tensor.size(2),
          tensor.size(3),   tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3), extent,           nullptr,          Activation::none};
}

Tensor new_images(const Tensor& like, int64_t count, int64_t channels, int64_t height,
                  int64_t width, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, {count, channels, height, width});
  const Tensor pixels = torch::stable::new_empty(like, {count, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(pixels, 1, 3), 2, 3);
}

// The kept entries of a dense weight, or the values themselves, in the type that they are
// multiplied in.
template <class T>
Tensor kept_values(const Tensor& weight, const SparseRows& structure) {
  const int64_t kept = structure.pointers[structure.rows];
  const Tensor flat = torch::stable::contiguous(weight);
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.numel() == kept, kOp, ": expected ", kept,
                    " values, got ", weight.numel());
    return in_dtype(flat, working_type<T>());
  }
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(0) == structure.rows &&
                      weight.numel() == structure.rows * structure.width,
                  kOp, ": expected a weight of the pattern's shape");
  Tensor values = torch::stable::new_empty(weight, {kept});
  const T* source = data<T>(flat);
  T* target = mutable_data<T>(values);
  for (int64_t row = 0; row < structure.rows; ++row, source += structure.width) {
    for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[j] = source[structure.columns[j]];
    }
  }
  return in_dtype(values, working_type<T>());
}

// The weight's gradient in the weight's form: values, or a dense weight that is zero elsewhere.
template <class T>
Tensor like_weight(const Tensor& values, const Tensor& weight, const SparseRows& structure) {
  if (weight.dim() == 1) return values;
  Tensor dense = torch::stable::new_zeros(
      values, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  const T* source = data<T>(values);
  T* target = mutable_data<T>(dense);
  for (int64_t row = 0; row < structure.rows; ++row, target += structure.width) {
    for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[structure.columns[j]] = source[j];
    }
  }
  return dense;
}

// Working memory of the calling thread for what a call derives from the pattern.
Scratch& offset_memory() {
  thread_local Scratch memory;
  return memory;
}

Scratch& value_memory() {
  thread_local Scratch memory;
  return memory;
}

// Rows of the grid that are packed at once: bands of equal height, high enough that packing the
// rows that neighbouring bands share costs little.
int64_t band_rows(int64_t height, int64_t reach, int64_t row_bytes) {
  constexpr int64_t kFewestRows = 4;
  const int64_t fitting = std::max(kPackedBytes / std::max<int64_t>(1, row_bytes) - reach,
                                   std::max(kFewestRows, reach));
  const int64_t bands = (height + fitting - 1) / fitting;
  return (height + bands - 1) / bands;
}

// Planes for taps that reach `reach` steps further along each axis of a grid.
template <class T>
OwnedPlanes planes_for(const AxisTaps& h, const AxisTaps& w, int64_t channels, int64_t grid_height,
                       int64_t grid_width, int64_t top, int64_t left, int64_t stride_h,
                       int64_t stride_w, bool interleaved, int64_t* band) {
  const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
  OwnedPlanes owned{
      {0, grid_width + w.reach, top, left, stride_h, stride_w, 0, 0, nullptr, nullptr, interleaved},
      h.phases,
      w.phases};
  const Planes& planes = owned.get();
  const int64_t row_bytes = channels * planes.phases_h * planes.phases_w * planes.width *
                            (interleaved ? lanes : 1) * static_cast<int64_t>(sizeof(Working<T>));
  *band = band_rows(grid_height, h.reach, row_bytes);
  owned.planes.rows = *band + h.reach;
  check_offsets(kOp, channels, planes, lanes);
  return owned;
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
  torch::stable::parallel_for(
      0, items * call.row_splits, std::max<int64_t>(1, kParallelWork / std::max<int64_t>(1, work)),
      [&](int64_t begin, int64_t end) {
        kernel(call, begin, end, thread_scratch().reserve<Working<T>>(size));
      });
}

// Ranges of rows with about equal numbers of kept entries; each sums over the images in order.
template <class T>
void run_weight_gradient(const ConvWeightGradient<T>& call, const SparseRows& structure) {
  if (call.gradient.count == 0) return;
  const int64_t work = structure.pointers[structure.rows] * call.gradient.count *
                       call.gradient.height * call.gradient.width;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kParallelWork, 1, threads);
  const auto kernel = TSCNC_SELECT(masked_conv2d_weight_gradient<T>);
  const auto scratch = TSCNC_SELECT(masked_conv2d_scratch<T>);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row_split(structure, begin, parts);
    const int64_t last = end == parts ? structure.rows : row_split(structure, end, parts);
    if (first >= last) return;
    const int64_t size = scratch(call.planes, call.input.channels, last - first, call.band);
    kernel(call, first, last, thread_scratch().reserve<Working<T>>(size));
  });
}

template <class T>
struct ForwardPlan {
  OwnedPlanes planes;
  OwnedTaps taps;
  int64_t band;

  ForwardPlan(const ConvShape& shape, const SparseRows& structure, bool interleaved) {
    const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
    const AxisTaps h = forward_axis(shape.height), w = forward_axis(shape.width);
    const int64_t grid_width = shape.width.output();
    planes = planes_for<T>(h, w, shape.in_channels, shape.height.output(), grid_width,
                           shape.height.before, shape.width.before, shape.height.stride,
                           shape.width.stride, interleaved, &band);
    const int64_t bytes =
        tile_bytes(planes.get(), h.reach, w.reach, grid_width, lanes, sizeof(Working<T>));
    const ChannelBlocks blocks =
        channel_blocks(shape.group_in(), structure.rows, structure.pointers[structure.rows], bytes);
    taps = forward_taps(shape, structure, h, w, planes.get(), lanes, blocks, offset_memory());
  }
};

bool interleaves(int64_t algorithm) {
  STD_TORCH_CHECK(algorithm == 0 || algorithm == 1, kOp,
                  ": expected the algorithm code 0 or 1, got ", algorithm);
  return algorithm == 1;
}

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::gelu), kOp,
                  ": expected an activation code from 0 to 2, got ", code);
  return static_cast<Activation>(code);
}

std::tuple<Tensor, Tensor> masked_conv2d_cpu(Tensor input, Tensor weight,
                                             std::optional<Tensor> bias, Tensor row_pointers,
                                             Tensor columns, std::vector<int64_t> geometry,
                                             int64_t activation, int64_t algorithm,
                                             bool channels_last, bool save_preactivation) {
  const bool interleaved = interleaves(algorithm);
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 11 && geometry[10] > 0, kOp,
                  ": expected input of 4 dimensions and 11 numbers of geometry");
  const int64_t width = input.size(1) / geometry[10] * geometry[0] * geometry[1];
  const SparseRows structure = kept_rows(row_pointers, columns, width);
  const ConvShape shape = conv_shape(input, structure, geometry);
  const Activation act = activation_of(activation);
  const ScalarType dtype = input.scalar_type();
  check_images(input, input, shape.in_channels, shape.height.size, shape.width.size, "input");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, kOp, ": weight and input differ in dtype");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->is_contiguous() &&
                        bias->numel() == structure.rows && bias->scalar_type() == dtype,
                    kOp, ": expected bias to be ", structure.rows, " contiguous entries");
  }
  const int64_t out_height = shape.height.output(), out_width = shape.width.output();
  const auto result = [&](int64_t count) {
    return new_images(input, count, structure.rows, out_height, out_width, channels_last);
  };
  const Tensor output = result(input.size(0));
  const Tensor preactivation = result(save_preactivation ? input.size(0) : 0);
  dispatch_floating(kOp, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = kept_values<T>(weight, structure);
    const Tensor offsets = bias.has_value() ? in_dtype(*bias, working_type<T>()) : values;
    ForwardPlan<T> plan(shape, structure, interleaved);
    auto* ordered = value_memory().reserve<Working<T>>(values.numel() + 1);
    to_blocks(plan.taps, data<Working<T>>(values), ordered);
    const ConvPart<T> part{plan.taps.get(), ordered, out_height, out_width, 0};
    run_product<T>({images<T>(input), plan.planes.get(), &part, 1, out_height, plan.band,
                    bias.has_value() ? data<Working<T>>(offsets) : nullptr, act,
                    mutable_data<T>(output),
                    save_preactivation ? mutable_data<T>(preactivation) : nullptr, output.stride(0),
                    output.stride(1), output.stride(2), output.stride(3), 1});
  });
  return {output, preactivation};
}

template <class T>
Tensor input_gradient(const ConvShape& shape, const SparseRows& structure, const Tensor& weight,
                      const Images<T>& gradient, const Tensor& input, bool interleaved,
                      bool channels_last) {
  const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
  const ConvAxis &height = shape.height, &width = shape.width;
  const int64_t top = backward_padding(height), left = backward_padding(width);
  std::vector<AxisTaps> h, w;
  AxisTaps widest_h{{0}, {}, {}, 0}, widest_w = widest_h;
  for (int64_t a = 0; a < height.stride; ++a) {
    h.push_back(backward_axis(height, a, top));
    widest_h.reach = std::max(widest_h.reach, h.back().reach);
  }
  for (int64_t b = 0; b < width.stride; ++b) {
    w.push_back(backward_axis(width, b, left));
    widest_w.reach = std::max(widest_w.reach, w.back().reach);
  }
  const int64_t grid_height = (height.size + height.stride - 1) / height.stride;
  const int64_t grid_width = (width.size + width.stride - 1) / width.stride;
  int64_t band = 0;
  OwnedPlanes planes = planes_for<T>(widest_h, widest_w, shape.out_channels, grid_height,
                                     grid_width, top, left, 1, 1, interleaved, &band);
  const int64_t bytes = tile_bytes(planes.get(), widest_h.reach, widest_w.reach, grid_width, lanes,
                                   sizeof(Working<T>));
  const int64_t parts = height.stride * width.stride;
  const ChannelBlocks blocks = channel_blocks(shape.group_out(), shape.in_channels * parts,
                                              structure.pointers[structure.rows], bytes);
  const Tensor values = kept_values<T>(weight, structure);
  const OwnedTaps taps =
      backward_taps(shape, structure, data<Working<T>>(values), h, w, planes.get(), lanes, blocks,
                    offset_memory(), value_memory());
  const auto* ordered = value_memory().reserve<Working<T>>(0);
  const Tensor result =
      new_images(input, input.size(0), shape.in_channels, height.size, width.size, channels_last);
  std::vector<ConvPart<T>> grids;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t a = part / width.stride, b = part % width.stride;
    Taps rows = taps.get();
    rows.bounds += part * shape.in_channels * blocks.count;
    grids.push_back({rows, ordered, (height.size - a + height.stride - 1) / height.stride,
                     (width.size - b + width.stride - 1) / width.stride,
                     a * result.stride(2) + b * result.stride(3)});
  }
  run_product<T>({gradient, planes.get(), grids.data(), parts, grid_height, band, nullptr,
                  Activation::none, mutable_data<T>(result), nullptr, result.stride(0),
                  result.stride(1), result.stride(2) * height.stride,
                  result.stride(3) * width.stride, 1});
  return result;
}

template <class T>
std::tuple<Tensor, Tensor> weight_gradient(const ConvShape& shape, const SparseRows& structure,
                                           const Tensor& weight, const Images<T>& gradient,
                                           const Tensor& input, bool interleaved, bool needs_weight,
                                           bool needs_bias) {
  const int64_t kept = needs_weight ? structure.pointers[structure.rows] : 0;
  Tensor values = torch::stable::new_empty(input, {kept}, working_type<T>());
  auto* ordered = value_memory().reserve<Working<T>>(kept + 1);
  std::fill(ordered, ordered + kept, Working<T>(0));
  Tensor bias =
      torch::stable::new_zeros(input, {needs_bias ? structure.rows : 0}, working_type<T>());
  ForwardPlan<T> plan(shape, structure, interleaved);
  run_weight_gradient<T>(
      {images<T>(input), plan.planes.get(), plan.taps.get(), gradient, plan.band,
       needs_weight ? ordered : nullptr, needs_bias ? mutable_data<Working<T>>(bias) : nullptr},
      structure);
  if (needs_weight) from_blocks(plan.taps, ordered, mutable_data<Working<T>>(values));
  values = in_dtype(values, input.scalar_type());
  bias = in_dtype(bias, input.scalar_type());
  return {needs_weight ? like_weight<T>(values, weight, structure) : values, bias};
}

// Both as they are, or contiguous where the kernels cannot read them side by side or an expanded
// gradient would be read element by element.
std::tuple<Tensor, Tensor> of_equal_strides(const Tensor& gradient, const Tensor& saved,
                                            bool scaled) {
  bool as_is = true;
  for (int64_t d = 0; d < 4; ++d) {
    if (gradient.size(d) == 1) continue;
    as_is &= gradient.stride(d) != 0 && (!scaled || saved.stride(d) == gradient.stride(d));
  }
  if (as_is) return {gradient, saved};
  return {torch::stable::contiguous(gradient), scaled ? torch::stable::contiguous(saved) : saved};
}

// `saved` is the output for relu and the preactivation for gelu. A gradient that is not needed
// comes back empty.
std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward_cpu(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, std::vector<int64_t> geometry, int64_t activation, int64_t input_algorithm,
    int64_t weight_algorithm, bool channels_last, bool needs_input, bool needs_weight,
    bool needs_bias) {
  const bool input_interleaved = interleaves(input_algorithm);
  const bool weight_interleaved = interleaves(weight_algorithm);
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 11 && geometry[10] > 0, kOp,
                  ": expected input of 4 dimensions and 11 numbers of geometry");
  const int64_t width = input.size(1) / geometry[10] * geometry[0] * geometry[1];
  const SparseRows structure = kept_rows(row_pointers, columns, width);
  const ConvShape shape = conv_shape(input, structure, geometry);
  const Activation act = activation_of(activation);
  check_images(input, input, shape.in_channels, shape.height.size, shape.width.size, "input");
  const int64_t out_height = shape.height.output(), out_width = shape.width.output();
  check_images(grad_output, input, shape.out_channels, out_height, out_width, "grad_output");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), kOp,
                  ": weight and input differ in dtype");
  const bool scaled = act != Activation::none;
  if (scaled) {
    check_images(saved, input, shape.out_channels, out_height, out_width, "saved");
  }
  std::tie(grad_output, saved) = of_equal_strides(grad_output, saved, scaled);
  Tensor grad_input = torch::stable::new_empty(input, {0});
  Tensor grad_weight = grad_input, grad_bias = grad_input;
  dispatch_floating(kOp, input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Images<T> gradient = images<T>(grad_output);
    gradient.saved = scaled ? data<T>(saved) : nullptr;
    gradient.activation = act;
    if (needs_input) {
      grad_input = input_gradient<T>(shape, structure, weight, gradient, input, input_interleaved,
                                     channels_last);
    }
    if (!needs_weight && !needs_bias) return;
    std::tie(grad_weight, grad_bias) = weight_gradient<T>(
        shape, structure, weight, gradient, input, weight_interleaved, needs_weight, needs_bias);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor row_pointers, "
      "Tensor columns, int[] geometry, int activation, int algorithm, bool channels_last, "
      "bool save_preactivation) -> (Tensor output, Tensor preactivation)");
  m.def(
      "masked_conv2d_backward(Tensor grad_output, Tensor saved, Tensor input, Tensor weight, "
      "Tensor row_pointers, Tensor columns, int[] geometry, int activation, int input_algorithm, "
      "int weight_algorithm, bool channels_last, bool needs_input, bool needs_weight, "
      "bool needs_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&tscnc::masked_conv2d_cpu));
  m.impl("masked_conv2d_backward", TORCH_BOX(&tscnc::masked_conv2d_backward_cpu));
}
