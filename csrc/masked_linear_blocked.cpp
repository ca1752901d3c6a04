// masked_linear by panels of samples whose blocks of features stay in the first-level cache.
#include <algorithm>
#include <cstring>

#include "blocked_index.h"
#include "cpu/blocked_linear.h"
#include "dtype_dispatch.h"
#include "masked_linear_algorithms.h"
#include "scratch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Entries that are worth a second thread when they are only moved.
constexpr int64_t kParallelMoves = 1 << 15;

template <class Function>
void for_tiles(const BlockedRows& index, const Function& function) {
  const int64_t grain = kParallelMoves * index.tiles() / std::max<int64_t>(1, index.kept);
  torch::stable::parallel_for(0, index.tiles(), std::max<int64_t>(1, grain), function);
}

// Moves every entry between its place in the index's order and a row-major list.
template <class T, class Move>
void move_values(const BlockedRows& index, const Move& move) {
  for_tiles(index, [&](int64_t begin, int64_t end) {
    for_each_segment(index, begin, end,
                     [&](int64_t, int64_t, int64_t entry, int64_t place, int64_t count) {
                       for (int64_t j = 0; j < count; ++j) move(entry + j, place + j);
                     });
  });
}

// Calls move(entry, offset) with the offset of every entry in a matrix of these strides. A column
// that was written to cannot lead outside.
template <class Move>
void move_dense(const BlockedRows& index, int64_t row_stride, int64_t column_stride,
                const Move& move) {
  for_tiles(index, [&](int64_t begin, int64_t end) {
    for_each_segment(index, begin, end,
                     [&](int64_t row, int64_t block, int64_t entry, int64_t, int64_t count) {
                       const int64_t first = block * index.block_width;
                       for (int64_t j = entry; j < entry + count; ++j) {
                         const int64_t column = std::min(first + index.columns[j], index.width - 1);
                         move(j, row * row_stride + column * column_stride);
                       }
                     });
  });
}

// The entries of a dense matrix or of row-major values, in the index's order.
template <class T>
Tensor blocked_values(const BlockedRows& index, const Tensor& weight, int64_t row_stride,
                      int64_t column_stride) {
  const Tensor from =
      weight.dim() == 2 || weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  Tensor values = torch::stable::new_empty(weight, {index.kept});
  const T* source = data<T>(from);
  T* target = mutable_data<T>(values);
  if (weight.dim() == 2) {
    move_dense(index, row_stride, column_stride,
               [=](int64_t entry, int64_t offset) { target[entry] = source[offset]; });
  } else {
    move_values<T>(index, [=](int64_t entry, int64_t place) { target[entry] = source[place]; });
  }
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

}  // namespace

void blocked_forward(const LinearForward& call) {
  const BlockedRows index =
      blocked_index(kMaskedLinear, call.columns, call.row_pointers.numel() - 1, call.input.size(1));
  check_weight(call.weight, index.rows, index.width, index.kept);
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool dense = call.weight.dim() == 2;
    const Tensor values = blocked_values<T>(index, call.weight, call.weight.stride(0),
                                            dense ? call.weight.stride(1) : 0);
    run_product<T>({index, data<Working<T>>(values), samples<T>(call.input),
                    call.bias.has_value() ? data<T>(*call.bias) : nullptr, call.activation,
                    mutable_data<T>(call.output),
                    call.preactivation.size(0) > 0 ? mutable_data<T>(call.preactivation) : nullptr,
                    1});
  });
}

void blocked_input_gradient(const LinearInputGradient& call) {
  const BlockedRows index = blocked_index(kMaskedLinear, call.column_rows,
                                          call.column_pointers.numel() - 1, call.gradient.size(1));
  check_weight(call.weight, index.width, index.rows, index.kept);
  const int32_t* order =
      bounded_index(kMaskedLinear, call.permutation, index.kept, index.kept, "permutation");
  dispatch_floating(kMaskedLinear, call.gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values =
        call.weight.dim() == 1
            ? permuted_values<T>(index, call.weight, order)
            : blocked_values<T>(index, call.weight, call.weight.stride(1), call.weight.stride(0));
    run_product<T>({index, data<Working<T>>(values),
                    samples<T>(call.gradient, call.saved, call.activation), nullptr,
                    Activation::none, mutable_data<T>(call.result), nullptr, 1});
  });
}

std::tuple<Tensor, Tensor> blocked_weight_gradient(const LinearWeightGradient& call) {
  const BlockedRows index =
      blocked_index(kMaskedLinear, call.columns, call.row_pointers.numel() - 1, call.input.size(1));
  check_weight(call.weight, index.rows, index.width, index.kept);
  const ScalarType dtype = call.input.scalar_type();
  std::tuple<Tensor, Tensor> result{call.weight, call.weight};
  dispatch_floating(kMaskedLinear, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor values =
        torch::stable::new_zeros(call.input, {call.needs_weight ? index.kept : 0}, kWorkingType<T>);
    Tensor bias =
        torch::stable::new_zeros(call.input, {call.needs_bias ? index.rows : 0}, kWorkingType<T>);
    run_weight_gradient<T>({index, samples<T>(call.input),
                            samples<T>(call.gradient, call.saved, call.activation),
                            call.needs_weight ? mutable_data<Working<T>>(values) : nullptr,
                            call.needs_bias ? mutable_data<Working<T>>(bias) : nullptr});
    values = in_dtype(values, dtype);
    Tensor weight = values;
    if (call.needs_weight) {
      const T* source = data<T>(values);
      if (call.weight.dim() == 2) {
        weight = torch::stable::new_zeros(values, {index.rows, index.width});
        T* target = mutable_data<T>(weight);
        move_dense(index, index.width, 1,
                   [=](int64_t entry, int64_t offset) { target[offset] = source[entry]; });
      } else {
        weight = torch::stable::empty_like(values);
        T* target = mutable_data<T>(weight);
        move_values<T>(index, [=](int64_t entry, int64_t place) { target[place] = source[entry]; });
      }
    }
    result = {weight, in_dtype(bias, dtype)};
  });
  return result;
}

}  // namespace tscnc
