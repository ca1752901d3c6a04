// masked_linear by panels of samples whose blocks of features stay in the first-level cache.
#include "masked_linear_blocked.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "blocked_index.h"
#include "cpu/blocked_linear.h"
#include "dtype_dispatch.h"
#include "masked_linear_checks.h"
#include "masked_linear_matrices.h"
#include "scratch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = kMaskedLinear;
// Multiply-adds that are worth a second thread.
constexpr int64_t kParallelWork = 1 << 18;
// Entries that are worth a second thread when they are only moved.
constexpr int64_t kParallelMoves = 1 << 15;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Without torch's dispatcher, which costs a microsecond, where there is nothing to convert.
Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
constexpr ScalarType kWorkingType =
    sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;

// The weight's own checks, once the index has told how many entries are kept.
void check_weight(const Tensor& weight, int64_t rows, int64_t width, int64_t kept) {
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.numel() == kept, kOp, ": expected ", kept, " values, got ",
                    weight.numel());
  } else {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == width, kOp,
                    ": expected weight to be a ", rows, " x ", width, " matrix");
  }
}

// Row-major values in the type that they are multiplied in.
template <class T>
Tensor working_values(const Tensor& values) {
  return in_dtype(values.is_contiguous() ? values : torch::stable::contiguous(values),
                  kWorkingType<T>);
}

template <class Function>
void for_tiles(const BlockedRows& index, const Function& function) {
  const int64_t grain = kParallelMoves * index.tiles() / std::max<int64_t>(1, index.kept);
  torch::stable::parallel_for(0, index.tiles(), std::max<int64_t>(1, grain), function);
}

// Where each row's entries begin in row-major order.
std::vector<int32_t> row_starts(const BlockedRows& index) {
  std::vector<int32_t> counts(static_cast<size_t>(index.rows)), starts(counts.size());
  for (int64_t tile = 0; tile < index.tiles(); ++tile) {
    int32_t* target = counts.data() + tile * kBlockedTileRows;
    for (int64_t block = 0; block < index.blocks(); ++block) {
      const uint8_t* found = index.row_counts(tile, block);
      for (int64_t row = 0; row < index.tile_rows(tile); ++row) target[row] += found[row];
    }
  }
  std::exclusive_scan(counts.begin(), counts.end(), starts.begin(), 0);
  return starts;
}

// Calls move(entry, place, offset) with every entry's place in the order of the index and in
// row-major order, and its offset in a matrix of these strides. A column that was written to cannot
// lead outside.
template <class Move>
void move_dense(const BlockedRows& index, int64_t row_stride, int64_t column_stride,
                const Move& move) {
  for_tiles(index, [&](int64_t begin, int64_t end) {
    for_each_segment(index, begin, end,
                     [&](int64_t row, int64_t block, int64_t entry, int64_t place, int64_t count) {
                       const int64_t first = block * index.block_width;
                       for (int64_t j = 0; j < count; ++j) {
                         const int64_t column =
                             std::min(first + index.columns[entry + j], index.width - 1);
                         move(entry + j, place + j, row * row_stride + column * column_stride);
                       }
                     });
  });
}

// The kept entries of a dense matrix, row-major, or those of its transpose in the order of the
// index.
template <class T>
Tensor kept_values(const BlockedRows& index, const Tensor& weight, bool transposed) {
  const Tensor values = torch::stable::new_empty(weight, {index.kept});
  const T* source = data<T>(weight);
  T* target = mutable_data<T>(values);
  move_dense(index, weight.stride(transposed), weight.stride(!transposed),
             [=](int64_t entry, int64_t place, int64_t offset) {
               target[transposed ? entry : place] = source[offset];
             });
  return in_dtype(values, kWorkingType<T>);
}

template <class T>
Tensor permuted_values(const BlockedRows& index, const Tensor& values, const int32_t* order) {
  const Tensor from = working_values<T>(values);
  Tensor result = torch::stable::empty_like(from);
  const auto* source = data<Working<T>>(from);
  auto* target = mutable_data<Working<T>>(result);
  torch::stable::parallel_for(0, index.kept, kParallelMoves, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) target[j] = source[order[j]];
  });
  return result;
}

template <class T>
void run_product(BlockedProduct<T> call) {
  if (call.input.count == 0) return;
  const int64_t lanes = TSCNC_SELECT(blocked_lanes<T>)();
  const int64_t panels = (call.input.count + lanes - 1) / lanes;
  const int64_t threads = torch::stable::get_num_threads();
  call.tile_splits =
      std::min(panels < threads ? (threads + panels - 1) / panels : 1, call.index.tiles());
  const int64_t work = (call.index.kept + call.index.width + call.index.rows) * lanes;
  const auto kernel = TSCNC_SELECT(blocked_product<T>);
  const int64_t size = TSCNC_SELECT(blocked_scratch<T>)(call.index);
  torch::stable::parallel_for(
      0, panels * call.tile_splits, std::max<int64_t>(1, kParallelWork * call.tile_splits / work),
      [&](int64_t begin, int64_t end) {
        kernel(call, begin, end, thread_scratch().reserve<Working<T>>(size));
      });
}

// First tile of part `part` when the tiles are cut into parts of about equal numbers of entries.
int64_t tile_split(const BlockedRows& index, int64_t part, int64_t parts) {
  int64_t tile = 0;
  while (tile < index.tiles() &&
         (index.first_entry(tile, 0) + tile) * parts < (index.kept + index.tiles()) * part) {
    ++tile;
  }
  return tile;
}

template <class T>
void run_weight_gradient(const BlockedWeightGradient<T>& call) {
  const BlockedRows& index = call.index;
  const int64_t work = index.kept * call.input.count, threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kParallelWork, 1, threads);
  const auto kernel = TSCNC_SELECT(blocked_weight_gradient<T>);
  const int64_t size = TSCNC_SELECT(blocked_scratch<T>)(index);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = tile_split(index, begin, parts), last = tile_split(index, end, parts);
    if (first < last) kernel(call, first, last, thread_scratch().reserve<Working<T>>(size));
  });
}

void blocked_forward(const LinearForward& call) {
  const BlockedRows index =
      blocked_index(kOp, call.columns, call.row_pointers.numel() - 1, call.input.size(1));
  check_weight(call.weight, index.rows, index.width, index.kept);
  const std::vector<int32_t> starts = row_starts(index);
  dispatch_floating(kOp, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = call.weight.dim() == 1 ? working_values<T>(call.weight)
                                                 : kept_values<T>(index, call.weight, false);
    run_product<T>({index, starts.data(), data<Working<T>>(values), samples<T>(call.input),
                    call.bias.has_value() ? data<T>(*call.bias) : nullptr, call.activation,
                    results<T>(call.output),
                    call.preactivation.size(0) > 0 ? results<T>(call.preactivation) : Results<T>{},
                    1});
  });
}

void blocked_input_gradient(const LinearInputGradient& call) {
  const BlockedRows index =
      blocked_index(kOp, call.column_rows, call.column_pointers.numel() - 1, call.gradient.size(1));
  check_weight(call.weight, index.width, index.rows, index.kept);
  const int32_t* order =
      bounded_index(kOp, call.permutation, index.kept, index.kept, "permutation");
  dispatch_floating(kOp, call.gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = call.weight.dim() == 1 ? permuted_values<T>(index, call.weight, order)
                                                 : kept_values<T>(index, call.weight, true);
    run_product<T>({index,
                    nullptr,
                    data<Working<T>>(values),
                    samples<T>(call.gradient, call.saved, call.activation),
                    nullptr,
                    Activation::none,
                    results<T>(call.result),
                    {},
                    1});
  });
}

std::tuple<Tensor, Tensor> blocked_weight_gradient(const LinearWeightGradient& call) {
  const BlockedRows index =
      blocked_index(kOp, call.columns, call.row_pointers.numel() - 1, call.input.size(1));
  check_weight(call.weight, index.rows, index.width, index.kept);
  const ScalarType dtype = call.input.scalar_type();
  const std::vector<int32_t> starts = row_starts(index);
  std::tuple<Tensor, Tensor> result{call.weight, call.weight};
  dispatch_floating(kOp, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor values =
        torch::stable::new_zeros(call.input, {call.needs_weight ? index.kept : 0}, kWorkingType<T>);
    Tensor bias =
        torch::stable::new_zeros(call.input, {call.needs_bias ? index.rows : 0}, kWorkingType<T>);
    run_weight_gradient<T>({index, starts.data(), samples<T>(call.input),
                            samples<T>(call.gradient, call.saved, call.activation),
                            call.needs_weight ? mutable_data<Working<T>>(values) : nullptr,
                            call.needs_bias ? mutable_data<Working<T>>(bias) : nullptr});
    values = in_dtype(values, dtype);
    Tensor weight = values;
    if (call.needs_weight && call.weight.dim() == 2) {
      const T* source = data<T>(values);
      weight = torch::stable::new_zeros(values, {index.rows, index.width});
      T* target = mutable_data<T>(weight);
      move_dense(index, index.width, 1,
                 [=](int64_t, int64_t place, int64_t offset) { target[offset] = source[place]; });
    }
    result = {weight, in_dtype(bias, dtype)};
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> blocked_linear(const Tensor& input, const Tensor& weight,
                                          const std::optional<Tensor>& bias,
                                          const Tensor& row_pointers, const Tensor& index,
                                          int64_t activation, bool save_preactivation,
                                          bool feature_major) {
  const int64_t rows = row_pointers.numel() - 1,
                saved_rows = save_preactivation ? input.size(0) : 0;
  STD_TORCH_CHECK(rows >= 1, kOp, ": expected row_pointers of at least one row, got none");
  check_matrix(input, input.size(0), input.size(1), input.scalar_type(), "input");
  check_operands(input, weight, bias, rows);
  const LinearForward call{input,
                           weight,
                           bias,
                           row_pointers,
                           index,
                           activation_of(activation),
                           new_matrix(input.size(0), rows, input.scalar_type(), feature_major),
                           new_matrix(saved_rows, rows, input.scalar_type(), feature_major)};
  blocked_forward(call);
  return {call.output, call.preactivation};
}

std::tuple<Tensor, Tensor, Tensor> blocked_linear_backward(BlockedBackward call) {
  const Tensor& input = call.weight.input;
  const int64_t rows = call.weight.row_pointers.numel() - 1, count = input.size(0);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(rows >= 1 && call.input.column_pointers.numel() == input.size(1) + 1, kOp,
                  ": expected pointers of at least one row and of ", input.size(1),
                  " columns, got ", rows, " and ", call.input.column_pointers.numel() - 1);
  check_matrix(input, count, input.size(1), dtype, "input");
  check_operands(input, call.weight.weight, std::nullopt, rows);
  check_matrix(call.input.gradient, count, rows, dtype, "grad_output");
  if (call.input.activation != Activation::none) {
    check_matrix(call.input.saved, count, rows, dtype, "saved");
  }
  const Tensor none = torch::stable::new_empty(input, {0});
  std::tuple<Tensor, Tensor> found{none, none};
  if (call.needs_input) {
    call.input.result = new_matrix(count, input.size(1), dtype, is_feature_major(input));
    blocked_input_gradient(call.input);
  }
  if (call.weight.needs_weight || call.weight.needs_bias)
    found = blocked_weight_gradient(call.weight);
  return {call.needs_input ? call.input.result : none, std::get<0>(found), std::get<1>(found)};
}

}  // namespace tscnc
