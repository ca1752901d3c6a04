// masked_conv2d on the CPU; Python side and formula: tscnc_kernels/ops/masked_conv2d.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "direct_conv_run.h"

namespace tscnc {
namespace {

std::tuple<Tensor, Tensor> masked_conv2d_cpu(Tensor input, Tensor weight,
                                             std::optional<Tensor> bias, Tensor row_pointers,
                                             Tensor columns, std::vector<int64_t> geometry,
                                             int64_t activation, int64_t algorithm,
                                             bool channels_last, bool save_preactivation) {
  const ConvAlgorithm chosen = conv_algorithm(algorithm);
  STD_TORCH_CHECK(input.dim() == 4 && geometry.size() == 11 && geometry[10] > 0, kConv,
                  ": expected input of 4 dimensions and 11 numbers of geometry");
  const int64_t width = input.size(1) / geometry[10] * geometry[0] * geometry[1];
  const SparseRows structure = kept_rows(row_pointers, columns, width);
  const ConvShape shape = conv_shape(input, structure, geometry);
  const Activation act = activation_of(activation);
  const ScalarType dtype = input.scalar_type();
  check_images(input, input, shape.in_channels, shape.height.size, shape.width.size, "input");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, kConv, ": weight and input differ in dtype");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->is_contiguous() &&
                        bias->numel() == structure.rows && bias->scalar_type() == dtype,
                    kConv, ": expected bias to be ", structure.rows, " contiguous entries");
  }
  const bool direct = chosen == ConvAlgorithm::direct;
  if (direct) check_direct(shape);
  const int64_t out_height = shape.height.output(), out_width = shape.width.output();
  const auto result = [&](int64_t count) {
    return new_images(input, count, structure.rows, out_height, out_width, channels_last);
  };
  Tensor output = result(direct ? 0 : input.size(0));
  Tensor preactivation = result(save_preactivation && !direct ? input.size(0) : 0);
  dispatch_floating(kConv, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = kept_values<T>(kConv, weight, structure);
    const Tensor offsets = bias.has_value() ? in_dtype(*bias, working_type<T>()) : values;
    const auto* added = bias.has_value() ? data<Working<T>>(offsets) : nullptr;
    if (direct) {
      const DirectPlan<T> plan(shape, structure, data<Working<T>>(values), false, kDirectVecs);
      std::tie(output, preactivation) =
          direct_product(plan, torch::stable::contiguous(input), added, act, save_preactivation);
      output = in_layout(output, channels_last);
      preactivation = in_layout(preactivation, channels_last);
      return;
    }
    ForwardPlan<T> plan(shape, structure, chosen == ConvAlgorithm::batch);
    auto* ordered = value_memory().reserve<Working<T>>(values.numel() + 1);
    to_blocks(plan.taps, data<Working<T>>(values), ordered);
    const ConvPart<T> part{plan.taps.get(), ordered, out_height, out_width, 0, 0, 0};
    run_product<T>({images<T>(input), plan.used.data(), plan.planes.get(), &part, 1, out_height,
                    plan.planes.band, added, act, mutable_data<T>(output),
                    save_preactivation ? mutable_data<T>(preactivation) : nullptr, output.stride(0),
                    output.stride(1), output.stride(2), output.stride(3), 1,
                    together(structure, plan.taps, 1, channels_last)});
  });
  return {output, preactivation};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor row_pointers, "
      "Tensor columns, int[] geometry, int activation, int algorithm, bool channels_last, "
      "bool save_preactivation) -> (Tensor output, Tensor preactivation)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&tscnc::masked_conv2d_cpu));
}
