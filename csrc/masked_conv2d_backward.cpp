// The gradients of masked_conv2d on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "direct_conv_run.h"

namespace tscnc {
namespace {

// Weights of a channel up to which one pass for both gradients is faster on interleaved planes.
// With more, blocks of channels that fit a first-level cache are.
constexpr int64_t kMostTogether = 64;

// Ranges of rows with about equal numbers of kept entries; each sums over the images in order.
template <class T>
void run_weight_gradient(const ConvWeightGradient<T>& call, const SparseRows& structure) {
  if (call.gradient.count == 0) return;
  const int64_t work = structure.pointers[structure.rows] * call.gradient.count *
                       call.gradient.height * call.gradient.width;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kConvParallelWork, 1, threads);
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

// The product that gives the input's gradient: a part per phase of the stride. With
// `one_block` the taps of a channel lie together.
template <class T>
struct InputPlan {
  OwnedPlanes planes;
  OwnedTaps taps;
  Tensor result;
  std::vector<ConvPart<T>> parts;
  std::vector<uint8_t> used;
  int64_t height;

  InputPlan(const ConvShape& shape, const SparseRows& structure, const Tensor& weight,
            const Tensor& input, bool interleaved, bool channels_last, bool one_block,
            bool needs_bias) {
    const int64_t lanes = TSCNC_SELECT(masked_conv2d_lanes<T>)();
    const ConvAxis &tall = shape.height, &wide = shape.width;
    const int64_t top = backward_padding(tall), left = backward_padding(wide);
    std::vector<AxisTaps> h, w;
    AxisTaps widest_h{{0}, {}, {}, 0}, widest_w = widest_h;
    for (int64_t a = 0; a < tall.stride; ++a) {
      h.push_back(backward_axis(tall, a, top));
      widest_h.reach = std::max(widest_h.reach, h.back().reach);
    }
    for (int64_t b = 0; b < wide.stride; ++b) {
      w.push_back(backward_axis(wide, b, left));
      widest_w.reach = std::max(widest_w.reach, w.back().reach);
    }
    height = (tall.size + tall.stride - 1) / tall.stride;
    const int64_t width = (wide.size + wide.stride - 1) / wide.stride;
    used = used_outputs(structure);
    if (needs_bias) std::fill(used.begin(), used.end(), 1);
    const Grid grid{shape.out_channels,
                    std::count(used.begin(), used.end(), 1),
                    height,
                    width,
                    top,
                    left,
                    1,
                    1};
    planes = planes_for(kConv, grid, widest_h, widest_w, interleaved, lanes, sizeof(Working<T>));
    const int64_t count = tall.stride * wide.stride;
    ChannelBlocks blocks{shape.group_out(), 1};
    if (!one_block) {
      const int64_t bytes = tile_bytes(planes.get(), widest_h.reach, widest_w.reach, width, lanes,
                                       sizeof(Working<T>));
      blocks = channel_blocks(shape.group_out(), shape.in_channels * count,
                              structure.pointers[structure.rows], bytes);
    }
    const Tensor values = kept_values<T>(kConv, weight, structure);
    taps = backward_taps(shape, structure, data<Working<T>>(values), h, w, planes.get(), lanes,
                         blocks, offset_memory(), value_memory());
    const auto* ordered = value_memory().reserve<Working<T>>(0);
    result =
        new_images(input, input.size(0), shape.in_channels, tall.size, wide.size, channels_last);
    for (int64_t part = 0; part < count; ++part) {
      const int64_t a = part / wide.stride, b = part % wide.stride;
      Taps rows = taps.get();
      rows.bounds += part * shape.in_channels * blocks.count;
      parts.push_back({rows, ordered, (tall.size - a + tall.stride - 1) / tall.stride,
                       (wide.size - b + wide.stride - 1) / wide.stride,
                       a * result.stride(2) + b * result.stride(3), static_cast<int32_t>(a),
                       static_cast<int32_t>(b)});
    }
  }
};

template <class T>
Tensor input_gradient(const ConvShape& shape, const SparseRows& structure, const Tensor& weight,
                      const Images<T>& gradient, const Tensor& input, bool interleaved,
                      bool channels_last) {
  InputPlan<T> plan(shape, structure, weight, input, interleaved, channels_last, false, false);
  const Tensor& result = plan.result;
  const auto parts = static_cast<int64_t>(plan.parts.size());
  run_product<T>({gradient, plan.used.data(), plan.planes.get(), plan.parts.data(), parts,
                  plan.height, plan.planes.band, nullptr, Activation::none, mutable_data<T>(result),
                  nullptr, result.stride(0), result.stride(1),
                  result.stride(2) * shape.height.stride, result.stride(3) * shape.width.stride, 1,
                  together(structure, plan.taps, parts, channels_last)});
  return result;
}

// Ranges of the input's channels with about equal numbers of kept entries; each sums over the
// images in order.
template <class T>
void run_backward(const ConvBackward<T>& call, int64_t kept, int64_t outputs) {
  if (call.gradient.count == 0) return;
  const int64_t channels = call.input.channels;
  std::vector<int64_t> before(static_cast<size_t>(channels + 1));
  int64_t most = 0;
  for (int64_t c = 0; c < channels; ++c) {
    int64_t sum = 0;
    for (int64_t p = 0; p < call.part_count; ++p) {
      const int32_t* bounds = call.parts[p].taps.bounds + c;
      const int64_t count = bounds[1] - bounds[0];
      most = std::max(most, count);
      sum += count;
    }
    before[static_cast<size_t>(c) + 1] = before[static_cast<size_t>(c)] + sum;
  }
  const int64_t work = kept * call.gradient.count * call.height * call.planes.width;
  const int64_t parts =
      std::clamp<int64_t>(work / kConvParallelWork, 1, torch::stable::get_num_threads());
  const auto split = [&](int64_t part) {
    if (part == parts) return channels;
    const auto found = std::lower_bound(before.begin(), before.end(), kept * part / parts);
    return static_cast<int64_t>(found - before.begin());
  };
  const auto kernel = TSCNC_SELECT(masked_conv2d_backward<T>);
  const int64_t size = TSCNC_SELECT(masked_conv2d_backward_scratch<T>)(call, most);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    kernel(call, split(begin), split(end), outputs * begin / parts, outputs * end / parts,
           thread_scratch().reserve<Working<T>>(size));
  });
}

// Whether every pixel of the output's gradient is in some band of its planes.
template <class T>
bool holds_all(const OwnedPlanes& planes, int64_t height, const Images<T>& gradient) {
  const int64_t bands = (height + planes.band - 1) / planes.band;
  const int64_t rows = (bands - 1) * planes.band + planes.planes.rows;
  return rows - planes.planes.top >= gradient.height &&
         planes.planes.width - planes.planes.left >= gradient.width;
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
  run_weight_gradient<T>({images<T>(input), plan.used.data(), plan.planes.get(), plan.taps.get(),
                          gradient, plan.planes.band, needs_weight ? ordered : nullptr,
                          needs_bias ? mutable_data<Working<T>>(bias) : nullptr},
                         structure);
  if (needs_weight) from_blocks(plan.taps, ordered, mutable_data<Working<T>>(values));
  values = in_dtype(values, input.scalar_type());
  bias = in_dtype(bias, input.scalar_type());
  return {needs_weight ? like_weight<T>(values, weight, structure) : values, bias};
}

// All gradients in one pass over the output's gradient.
template <class T>
std::tuple<Tensor, Tensor, Tensor> all_gradients(const ConvShape& shape,
                                                 const SparseRows& structure, const Tensor& weight,
                                                 const Images<T>& gradient, const Tensor& input,
                                                 bool interleaved, bool channels_last,
                                                 bool needs_bias) {
  InputPlan<T> plan(shape, structure, weight, input, interleaved, channels_last, true, needs_bias);
  const int64_t kept = structure.pointers[structure.rows];
  const bool with_bias = needs_bias && holds_all(plan.planes, plan.height, gradient);
  Tensor ordered = torch::stable::new_zeros(input, {kept}, working_type<T>());
  Tensor bias =
      torch::stable::new_zeros(input, {with_bias ? structure.rows : 0}, working_type<T>());
  const Tensor& result = plan.result;
  run_backward<T>(
      {gradient, plan.used.data(), plan.planes.get(), plan.parts.data(),
       static_cast<int64_t>(plan.parts.size()), plan.height, plan.planes.band, images<T>(input),
       shape.height.stride, shape.width.stride, mutable_data<T>(result), result.stride(0),
       result.stride(1), result.stride(2) * shape.height.stride,
       result.stride(3) * shape.width.stride, mutable_data<Working<T>>(ordered),
       with_bias ? mutable_data<Working<T>>(bias) : nullptr},
      kept, structure.rows);
  Tensor values = torch::stable::new_empty(input, {kept}, working_type<T>());
  const auto* source = data<Working<T>>(ordered);
  auto* target = mutable_data<Working<T>>(values);
  for (int64_t j = 0; j < kept; ++j) target[j] = source[plan.taps.places[j]];
  if (needs_bias && !with_bias) {
    std::tie(ordered, bias) =
        weight_gradient<T>(shape, structure, weight, gradient, input, interleaved, false, true);
  }
  const ScalarType dtype = input.scalar_type();
  return {result, like_weight<T>(in_dtype(values, dtype), weight, structure),
          in_dtype(bias, dtype)};
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
// comes back empty. The transposed index is CUDA's: here the taps of a plan take its place.
std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward_cpu(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, Tensor, Tensor, Tensor, std::vector<int64_t> geometry, int64_t activation,
    int64_t input_algorithm, int64_t weight_algorithm, bool channels_last, bool needs_input,
    bool needs_weight, bool needs_bias) {
  const ConvAlgorithm for_input = conv_algorithm(input_algorithm);
  const ConvAlgorithm for_weight = conv_algorithm(weight_algorithm);
  const bool direct_input = needs_input && for_input == ConvAlgorithm::direct;
  const bool direct_weight = (needs_weight || needs_bias) && for_weight == ConvAlgorithm::direct;
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 11 && geometry[10] > 0, kConv,
                  ": expected input of 4 dimensions and 11 numbers of geometry");
  const int64_t width = input.size(1) / geometry[10] * geometry[0] * geometry[1];
  const SparseRows structure = kept_rows(row_pointers, columns, width);
  const ConvShape shape = conv_shape(input, structure, geometry);
  const Activation act = activation_of(activation);
  check_images(input, input, shape.in_channels, shape.height.size, shape.width.size, "input");
  const int64_t out_height = shape.height.output(), out_width = shape.width.output();
  check_images(grad_output, input, shape.out_channels, out_height, out_width, "grad_output");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), kConv,
                  ": weight and input differ in dtype");
  const bool scaled = act != Activation::none;
  if (scaled) {
    check_images(saved, input, shape.out_channels, out_height, out_width, "saved");
  }
  std::tie(grad_output, saved) = of_equal_strides(grad_output, saved, scaled);
  if (direct_input || direct_weight) check_direct(shape);
  const int64_t kept = structure.pointers[structure.rows];
  Tensor grad_input = torch::stable::new_empty(input, {0});
  Tensor grad_weight = grad_input, grad_bias = grad_input;
  dispatch_floating(kConv, input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Images<T> gradient = images<T>(grad_output);
    gradient.saved = scaled ? data<T>(saved) : nullptr;
    gradient.activation = act;
    if (direct_input || direct_weight) {
      const Tensor scaled_output = scaled_gradient<T>(grad_output, saved, act);
      std::tie(grad_input, grad_weight, grad_bias) = direct_gradients<T>(
          shape, structure, weight, scaled_output, torch::stable::contiguous(input), direct_input,
          direct_weight && needs_weight, direct_weight && needs_bias);
      grad_input = in_layout(grad_input, direct_input && channels_last);
    }
    const bool input_interleaved = for_input == ConvAlgorithm::batch;
    const bool weight_interleaved = for_weight == ConvAlgorithm::batch;
    const bool alike = for_input == for_weight && for_input != ConvAlgorithm::direct &&
                       (!input_interleaved || kept <= kMostTogether * shape.in_channels);
    if (needs_input && needs_weight && alike) {
      std::tie(grad_input, grad_weight, grad_bias) = all_gradients<T>(
          shape, structure, weight, gradient, input, input_interleaved, channels_last, needs_bias);
      return;
    }
    if (needs_input && !direct_input) {
      grad_input = input_gradient<T>(shape, structure, weight, gradient, input, input_interleaved,
                                     channels_last);
    }
    if ((!needs_weight && !needs_bias) || direct_weight) return;
    std::tie(grad_weight, grad_bias) = weight_gradient<T>(
        shape, structure, weight, gradient, input, weight_interleaved, needs_weight, needs_bias);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_conv2d_backward(Tensor grad_output, Tensor saved, Tensor input, Tensor weight, "
      "Tensor row_pointers, Tensor columns, Tensor column_pointers, Tensor column_rows, "
      "Tensor permutation, int[] geometry, int activation, int input_algorithm, "
      "int weight_algorithm, bool channels_last, bool needs_input, bool needs_weight, "
      "bool needs_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("masked_conv2d_backward", TORCH_BOX(&tscnc::masked_conv2d_backward_cpu));
}
