// masked_linear by panels of samples that meet whole rows of the weight.
#include <algorithm>

#include "dtype_dispatch.h"
#include "masked_linear_algorithms.h"
#include "scratch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

SparseRows sparse_rows(const Tensor& pointers, const Tensor& columns, int64_t width,
                       const char* pointers_name, const char* columns_name) {
  const int64_t kept = columns.numel();
  const int32_t* begin = pointer_data(kMaskedLinear, pointers, kept, pointers_name);
  return {begin, bounded_index(kMaskedLinear, columns, kept, width, columns_name),
          pointers.numel() - 1, width};
}

template <class Function>
void for_rows(const SparseRows& structure, const Function& function) {
  const int64_t rows = structure.rows, cost = structure.pointers[rows] / rows + 1;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / cost),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) function(row);
                              });
}

// Entry (row, structure.columns[j]) of a matrix with these strides, for every kept entry j.
template <class T>
Tensor kept_entries(const Tensor& matrix, const SparseRows& structure, int64_t row_stride,
                    int64_t column_stride) {
  Tensor values = torch::stable::new_empty(matrix, {structure.pointers[structure.rows]});
  const T* source = data<T>(matrix);
  T* target = mutable_data<T>(values);
  for_rows(structure, [&](int64_t row) {
    const T* entries = source + row * row_stride;
    for (int64_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[j] = entries[structure.columns[j] * column_stride];
    }
  });
  return in_dtype(values, kWorkingType<T>);
}

// A dense matrix that is zero where no entry is kept.
template <class T>
Tensor scattered(const Tensor& values, const SparseRows& structure) {
  Tensor matrix = torch::stable::new_zeros(values, {structure.rows, structure.width});
  const T* source = data<T>(values);
  T* target = mutable_data<T>(matrix);
  for_rows(structure, [&](int64_t row) {
    T* entries = target + row * structure.width;
    for (int64_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      entries[structure.columns[j]] = source[j];
    }
  });
  return matrix;
}

// One parallel region: panels of samples, and also ranges of rows where there are fewer panels than
// threads.
template <class T>
void run_product(MaskedProduct<T> call) {
  if (call.input.count == 0) return;
  const int64_t lanes = TSCNC_SELECT(masked_linear_lanes<T>)();
  const int64_t panels = (call.input.count + lanes - 1) / lanes;
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits = panels < threads ? (threads + panels - 1) / panels : 1;
  const int64_t work =
      (call.structure.pointers[call.structure.rows] + call.structure.width + call.structure.rows) *
      lanes / call.row_splits;
  const auto kernel = TSCNC_SELECT(masked_linear_product<T>);
  const int64_t size = TSCNC_SELECT(masked_linear_scratch<T>)(call.structure.width);
  torch::stable::parallel_for(0, panels * call.row_splits,
                              std::max<int64_t>(1, kParallelWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                auto* scratch = thread_scratch().reserve<Working<T>>(size);
                                kernel(call, begin, end, scratch);
                              });
}

// Ranges of rows with about equal numbers of kept entries; each sums over the batch in order.
template <class T>
void run_weight_gradient(const MaskedWeightGradient<T>& call) {
  const SparseRows& structure = call.structure;
  const int64_t work = structure.pointers[structure.rows] * call.input.count;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kParallelWork, 1, threads);
  const auto kernel = TSCNC_SELECT(masked_linear_weight_gradient<T>);
  const int64_t size = TSCNC_SELECT(masked_linear_scratch<T>)(structure.width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row_split(structure, begin, parts);
    const int64_t last = end == parts ? structure.rows : row_split(structure, end, parts);
    if (first < last) kernel(call, first, last, thread_scratch().reserve<Working<T>>(size));
  });
}

}  // namespace

void panel_forward(const LinearForward& call) {
  const SparseRows structure =
      sparse_rows(call.row_pointers, call.columns, call.input.size(1), "row_pointers", "columns");
  check_weight(call.weight, structure.rows, structure.width, call.columns.numel());
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values =
        call.weight.dim() == 1
            ? working_values<T>(call.weight)
            : kept_entries<T>(call.weight, structure, call.weight.stride(0), call.weight.stride(1));
    run_product<T>({structure, data<Working<T>>(values), samples<T>(call.input),
                    call.bias.has_value() ? data<T>(*call.bias) : nullptr, call.activation,
                    mutable_data<T>(call.output),
                    call.preactivation.size(0) > 0 ? mutable_data<T>(call.preactivation) : nullptr,
                    1});
  });
}

void panel_input_gradient(const LinearInputGradient& call) {
  const int64_t rows = call.gradient.size(1), kept = call.column_rows.numel();
  const SparseRows structure =
      sparse_rows(call.column_pointers, call.column_rows, rows, "column_pointers", "column_rows");
  const int32_t* order = bounded_index(kMaskedLinear, call.permutation, kept, kept, "permutation");
  check_weight(call.weight, rows, structure.rows, kept);
  dispatch_floating(kMaskedLinear, call.gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor values = call.weight;
    if (call.weight.dim() == 1) {
      const Tensor ordered = working_values<T>(call.weight);
      values = torch::stable::empty_like(ordered);
      const auto* source = data<Working<T>>(ordered);
      auto* target = mutable_data<Working<T>>(values);
      for_rows(structure, [&](int64_t row) {
        for (int64_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
          target[j] = source[order[j]];
        }
      });
    } else {
      values =
          kept_entries<T>(call.weight, structure, call.weight.stride(1), call.weight.stride(0));
    }
    run_product<T>({structure, data<Working<T>>(values),
                    samples<T>(call.gradient, call.saved, call.activation), nullptr,
                    Activation::none, mutable_data<T>(call.result), nullptr, 1});
  });
}

std::tuple<Tensor, Tensor> panel_weight_gradient(const LinearWeightGradient& call) {
  const SparseRows structure =
      sparse_rows(call.row_pointers, call.columns, call.input.size(1), "row_pointers", "columns");
  const int64_t kept = call.columns.numel();
  check_weight(call.weight, structure.rows, structure.width, kept);
  const ScalarType dtype = call.input.scalar_type();
  std::tuple<Tensor, Tensor> result{call.weight, call.weight};
  dispatch_floating(kMaskedLinear, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor values =
        torch::stable::new_zeros(call.input, {call.needs_weight ? kept : 0}, kWorkingType<T>);
    Tensor bias = torch::stable::new_zeros(call.input, {call.needs_bias ? structure.rows : 0},
                                           kWorkingType<T>);
    run_weight_gradient<T>({structure, samples<T>(call.input),
                            samples<T>(call.gradient, call.saved, call.activation),
                            call.needs_weight ? mutable_data<Working<T>>(values) : nullptr,
                            call.needs_bias ? mutable_data<Working<T>>(bias) : nullptr});
    values = in_dtype(values, dtype);
    const bool dense = call.needs_weight && call.weight.dim() == 2;
    result = {dense ? scattered<T>(values, structure) : values, in_dtype(bias, dtype)};
  });
  return result;
}

}  // namespace tscnc
