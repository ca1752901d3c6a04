// Batch normalisation and ReLU on the CPU; Python side and formula:
// tscnc_kernels/ops/batch_norm_relu.py.
#include "cpu/batch_norm_relu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype_dispatch.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Channels = std::vector<BatchNormChannel>;
using Sums = std::vector<BatchNormSums>;

constexpr char kOp[] = "batch_norm_relu";
// Entries of a channel's plane from which on the plane form is the faster one.
constexpr int64_t kPlaneLength = 32;
// Rows of a block, whose sums are joined in a fixed order, and entries that are worth a second
// thread.
constexpr int64_t kBlockRows = 4096;
constexpr int64_t kParallelEntries = 1 << 15;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

BatchNormShape shape_of(const Tensor& input) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 3 && input.is_contiguous(), kOp,
                  ": expected a contiguous (outer, channels, length) tensor on the CPU, got ",
                  input.dim(), " dimensions");
  return {input.size(0), input.size(1), input.size(2)};
}

// One double per channel from a tensor of any floating dtype; `missing` without a tensor.
std::vector<double> per_channel(const std::optional<Tensor>& tensor, int64_t channels,
                                double missing, const char* name) {
  std::vector<double> values(channels, missing);
  if (!tensor.has_value()) return values;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->numel() == channels, kOp, ": expected ", name, " of ",
                  channels, " entries on the CPU, got ", tensor->numel());
  // Without torch's dispatcher, which costs microseconds, where nothing has to be converted first.
  const ScalarType dtype = tensor->scalar_type();
  const bool direct =
      tensor->is_contiguous() && (dtype == ScalarType::Float || dtype == ScalarType::Double);
  const Tensor exact =
      direct ? *tensor : torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Double));
  if (exact.scalar_type() == ScalarType::Float) {
    std::copy_n(data<float>(exact), channels, values.begin());
  } else {
    std::copy_n(data<double>(exact), channels, values.begin());
  }
  return values;
}

Tensor double_tensor(const Tensor& like, const std::vector<double>& values) {
  const auto count = static_cast<int64_t>(values.size());
  Tensor result = torch::stable::new_empty(like, {count}, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

// The affine maps of all channels, from their statistics.
struct Affine {
  std::vector<double> weight, bias;
  double eps;
  bool relu;

  BatchNormChannel channel(int64_t c, double mean, double variance) const {
    return {mean, weight[c] / std::sqrt(variance + eps), bias[c], relu, 0, 0};
  }
};

bool uses_planes(BatchNormShape shape) { return shape.length >= kPlaneLength; }

template <class Run>
void for_channels(BatchNormShape shape, const Run& run) {
  const int64_t each = shape.outer * shape.length;
  const int64_t grain = std::max<int64_t>(1, kParallelEntries / std::max<int64_t>(1, each));
  torch::stable::parallel_for(0, shape.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) run(c);
  });
}

// Blocks of rows and columns, numbered; the blocks of one range of rows follow each other.
struct Blocks {
  BatchNormShape shape;
  int64_t across = (shape.columns() + kBatchNormColumns - 1) / kBatchNormColumns;
  int64_t down = (shape.outer + kBlockRows - 1) / kBlockRows;

  BatchNormBlock at(int64_t index) const {
    const int64_t row = index / across * kBlockRows, column = index % across * kBatchNormColumns;
    return {row, std::min(row + kBlockRows, shape.outer), column,
            std::min(column + kBatchNormColumns, shape.columns())};
  }

  template <class Run>
  void for_each(const Run& run) const {
    const int64_t each =
        std::min(kBlockRows, shape.outer) * std::min(kBatchNormColumns, shape.columns());
    const int64_t grain = std::max<int64_t>(1, kParallelEntries / std::max<int64_t>(1, each));
    torch::stable::parallel_for(0, across * down, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(at(i));
    });
  }
};

// Where the sums of a block's columns go: one row of sums per range of rows.
BatchNormSums* sums_of(Sums& sums, const Blocks& blocks, BatchNormBlock block) {
  return sums.data() + block.row_begin / kBlockRows * blocks.shape.columns() + block.column_begin;
}

// Statistics of each channel from those of its columns in all ranges of rows (Chan's formula).
Sums join_statistics(const Sums& parts, const Blocks& blocks) {
  const BatchNormShape& shape = blocks.shape;
  Sums joined(shape.channels, BatchNormSums{0, 0});
  std::vector<double> counts(shape.channels, 0);
  for (int64_t range = 0; range < blocks.down; ++range) {
    const int64_t row = range * kBlockRows;
    const auto count = static_cast<double>(std::min(kBlockRows, shape.outer - row));
    for (int64_t column = 0; column < shape.columns(); ++column) {
      const int64_t c = column / shape.length;
      const BatchNormSums& part = parts[range * shape.columns() + column];
      const double distance = part.first - joined[c].first, all = counts[c] + count;
      joined[c].second += part.second + distance * distance * (counts[c] * count / all);
      joined[c].first += distance * (count / all);
      counts[c] = all;
    }
  }
  return joined;
}

Sums add_sums(const Sums& parts, const Blocks& blocks) {
  Sums added(blocks.shape.channels, BatchNormSums{0, 0});
  const int64_t columns = blocks.shape.columns();
  for (size_t i = 0; i < parts.size(); ++i) {
    BatchNormSums& sum = added[static_cast<int64_t>(i) % columns / blocks.shape.length];
    sum.first += parts[i].first;
    sum.second += parts[i].second;
  }
  return added;
}

template <class T>
void forward(const T* x, T* y, BatchNormShape shape, const Affine& affine, bool training,
             std::vector<double>& mean, std::vector<double>& variance) {
  const auto count = static_cast<double>(shape.outer * shape.length);
  if (uses_planes(shape)) {
    const auto statistics = TSCNC_SELECT(batch_norm_plane_statistics<T>);
    const auto output = TSCNC_SELECT(batch_norm_plane_output<T>);
    for_channels(shape, [&](int64_t c) {
      if (training) {
        const BatchNormSums found = statistics(x, shape, c);
        mean[c] = found.first;
        variance[c] = found.second / count;
      }
      output(x, y, shape, c, affine.channel(c, mean[c], variance[c]));
    });
    return;
  }
  const Blocks blocks{shape};
  if (training) {
    const auto statistics = TSCNC_SELECT(batch_norm_row_statistics<T>);
    Sums parts(blocks.down * shape.columns());
    blocks.for_each(
        [&](BatchNormBlock block) { statistics(x, shape, block, sums_of(parts, blocks, block)); });
    const Sums found = join_statistics(parts, blocks);
    for (int64_t c = 0; c < shape.channels; ++c) {
      mean[c] = found[c].first;
      variance[c] = found[c].second / count;
    }
  }
  Channels channels;
  for (int64_t c = 0; c < shape.channels; ++c) {
    channels.push_back(affine.channel(c, mean[c], variance[c]));
  }
  const auto output = TSCNC_SELECT(batch_norm_row_output<T>);
  blocks.for_each([&](BatchNormBlock block) { output(x, y, shape, block, channels.data()); });
}

// Without given statistics (training) they are the batch's. Both come back in any case.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_cpu(Tensor input, std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias,
                                                       std::optional<Tensor> mean,
                                                       std::optional<Tensor> variance, double eps,
                                                       bool relu) {
  const BatchNormShape shape = shape_of(input);
  const bool training = !mean.has_value();
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(), kOp,
                  ": expected mean and variance, or neither");
  const Affine affine = {per_channel(weight, shape.channels, 1, "weight"),
                         per_channel(bias, shape.channels, 0, "bias"), eps, relu};
  std::vector<double> means = per_channel(mean, shape.channels, 0, "mean");
  std::vector<double> variances = per_channel(variance, shape.channels, 0, "variance");
  Tensor output = torch::stable::empty_like(input);
  if (input.numel() > 0) {
    dispatch_floating(kOp, input.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      forward<T>(data<T>(input), static_cast<T*>(output.mutable_data_ptr()), shape, affine,
                 training, means, variances);
    });
  }
  return {output, double_tensor(input, means), double_tensor(input, variances)};
}

struct Wanted {
  bool input, affine, training;
  bool sums() const { return affine || (input && training); }
};

// What the batch's statistics add to the gradient of the input.
void add_statistics_gradient(BatchNormChannel& channel, const BatchNormSums& sums, double variance,
                             double eps, double count) {
  channel.level = channel.scale * sums.first / count;
  channel.slope = channel.scale * sums.second / (count * (variance + eps));
}

template <class T>
Sums backward(const T* g, const T* x, T* dx, BatchNormShape shape, Channels& channels,
              const std::vector<double>& variance, double eps, Wanted wanted) {
  const auto count = static_cast<double>(shape.outer * shape.length);
  Sums sums(shape.channels, BatchNormSums{0, 0});
  const auto finish = [&](int64_t c) {
    if (wanted.training) {
      add_statistics_gradient(channels[c], sums[c], variance[c], eps, count);
    }
  };
  if (uses_planes(shape)) {
    const auto add_up = TSCNC_SELECT(batch_norm_plane_sums<T>);
    const auto gradient = TSCNC_SELECT(batch_norm_plane_gradient<T>);
    for_channels(shape, [&](int64_t c) {
      if (wanted.sums()) sums[c] = add_up(g, x, shape, c, channels[c]);
      finish(c);
      if (wanted.input) gradient(g, x, dx, shape, c, channels[c]);
    });
    return sums;
  }
  const Blocks blocks{shape};
  if (wanted.sums()) {
    const auto add_up = TSCNC_SELECT(batch_norm_row_sums<T>);
    Sums parts(blocks.down * shape.columns());
    blocks.for_each([&](BatchNormBlock block) {
      add_up(g, x, shape, block, channels.data(), sums_of(parts, blocks, block));
    });
    sums = add_sums(parts, blocks);
  }
  for (int64_t c = 0; c < shape.channels; ++c) finish(c);
  const auto gradient = TSCNC_SELECT(batch_norm_row_gradient<T>);
  if (wanted.input) {
    blocks.for_each(
        [&](BatchNormBlock block) { gradient(g, x, dx, shape, block, channels.data()); });
  }
  return sums;
}

// The gradients of weight and bias are double; one that is not wanted comes back empty.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cpu(
    Tensor grad_output, Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
    Tensor mean, Tensor variance, double eps, bool relu, bool training, bool needs_input,
    bool needs_affine) {
  const BatchNormShape shape = shape_of(input);
  const BatchNormShape other = shape_of(grad_output);
  STD_TORCH_CHECK(other.outer == shape.outer && other.channels == shape.channels &&
                      other.length == shape.length &&
                      grad_output.scalar_type() == input.scalar_type(),
                  kOp, ": grad_output and input differ in shape or dtype");
  const Affine affine = {per_channel(weight, shape.channels, 1, "weight"),
                         per_channel(bias, shape.channels, 0, "bias"), eps, relu};
  const std::vector<double> means = per_channel(mean, shape.channels, 0, "mean");
  const std::vector<double> variances = per_channel(variance, shape.channels, 0, "variance");
  Channels channels;
  for (int64_t c = 0; c < shape.channels; ++c) {
    channels.push_back(affine.channel(c, means[c], variances[c]));
  }
  Tensor grad_input =
      needs_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  Sums sums(shape.channels, BatchNormSums{0, 0});
  if (input.numel() > 0) {
    dispatch_floating(kOp, input.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      sums = backward<T>(data<T>(grad_output), data<T>(input),
                         static_cast<T*>(grad_input.mutable_data_ptr()), shape, channels, variances,
                         eps, {needs_input, needs_affine, training});
    });
  }
  std::vector<double> grad_weight, grad_bias;
  for (int64_t c = 0; needs_affine && c < shape.channels; ++c) {
    grad_weight.push_back(sums[c].second / std::sqrt(variances[c] + eps));
    grad_bias.push_back(sums[c].first);
  }
  return {grad_input, double_tensor(input, grad_weight), double_tensor(input, grad_bias)};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, "
      "Tensor? variance, float eps, bool relu) -> (Tensor output, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor variance, float eps, bool relu, bool training, bool needs_input, "
      "bool needs_affine) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&tscnc::batch_norm_relu_cpu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&tscnc::batch_norm_relu_backward_cpu));
}
