// The kept entries of a weight row by row, as the algorithms on the canonical index read them.
#pragma once

#include <algorithm>

#include "masked_linear_algorithms.h"
#include "sparse_index.h"

namespace tscnc {

// `checked`: every column is looked at here, for kernels that do not check what they read.
inline SparseRows sparse_rows(const torch::stable::Tensor& pointers,
                              const torch::stable::Tensor& columns, int64_t width,
                              const char* pointers_name, const char* columns_name,
                              bool checked = true) {
  const int64_t kept = columns.numel();
  const int32_t* begin = pointer_data(kMaskedLinear, pointers, kept, pointers_name);
  const int32_t* entries = checked
                               ? bounded_index(kMaskedLinear, columns, kept, width, columns_name)
                               : index_data(kMaskedLinear, columns, kept, columns_name);
  return {begin, entries, pointers.numel() - 1, width};
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
torch::stable::Tensor kept_entries(const torch::stable::Tensor& matrix, const SparseRows& structure,
                                   int64_t row_stride, int64_t column_stride) {
  torch::stable::Tensor values =
      torch::stable::new_empty(matrix, {structure.pointers[structure.rows]});
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

// The weight's kept entries row by row.
template <class T>
torch::stable::Tensor row_values(const torch::stable::Tensor& weight, const SparseRows& structure) {
  check_weight(weight, structure.rows, structure.width, structure.pointers[structure.rows]);
  return weight.dim() == 1 ? working_values<T>(weight)
                           : kept_entries<T>(weight, structure, weight.stride(0), weight.stride(1));
}

// The same column by column: `order` leads to the place in row-major order.
template <class T>
torch::stable::Tensor column_values(const torch::stable::Tensor& weight,
                                    const SparseRows& structure, const int32_t* order) {
  check_weight(weight, structure.width, structure.rows, structure.pointers[structure.rows]);
  if (weight.dim() == 2) {
    return kept_entries<T>(weight, structure, weight.stride(1), weight.stride(0));
  }
  const torch::stable::Tensor ordered = working_values<T>(weight);
  torch::stable::Tensor values = torch::stable::empty_like(ordered);
  const auto* source = data<Working<T>>(ordered);
  auto* target = mutable_data<Working<T>>(values);
  for_rows(structure, [&](int64_t row) {
    for (int64_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[j] = source[order[j]];
    }
  });
  return values;
}

// A dense matrix that is zero where no entry is kept.
template <class T>
torch::stable::Tensor scattered(const torch::stable::Tensor& values, const SparseRows& structure) {
  torch::stable::Tensor matrix =
      torch::stable::new_zeros(values, {structure.rows, structure.width});
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

template <class T>
MaskedProduct<T> forward_product(const LinearForward& call, const SparseRows& structure,
                                 const torch::stable::Tensor& values) {
  return {structure,
          data<Working<T>>(values),
          samples<T>(call.input),
          call.bias.has_value() ? data<T>(*call.bias) : nullptr,
          call.activation,
          mutable_data<T>(call.output),
          call.preactivation.size(0) > 0 ? mutable_data<T>(call.preactivation) : nullptr,
          1};
}

// The product with the transposed weight.
template <class T>
MaskedProduct<T> input_gradient_product(const LinearInputGradient& call,
                                        const SparseRows& structure,
                                        const torch::stable::Tensor& values) {
  return {structure,
          data<Working<T>>(values),
          samples<T>(call.gradient, call.saved, call.activation),
          nullptr,
          Activation::none,
          mutable_data<T>(call.result),
          nullptr,
          1};
}

// Gradients of the kept entries and of the bias. run(call) adds to zeros, or, where it
// `overwrites`, writes every kept entry's.
template <class T, class Run>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> weight_gradient(
    const LinearWeightGradient& call, const SparseRows& structure, bool overwrites,
    const Run& run) {
  const int64_t kept = structure.pointers[structure.rows], size = call.needs_weight ? kept : 0;
  check_weight(call.weight, structure.rows, structure.width, kept);
  torch::stable::Tensor values =
      overwrites ? torch::stable::new_empty(call.input, {size}, kWorkingType<T>)
                 : torch::stable::new_zeros(call.input, {size}, kWorkingType<T>);
  torch::stable::Tensor bias =
      torch::stable::new_zeros(call.input, {call.needs_bias ? structure.rows : 0}, kWorkingType<T>);
  run(MaskedWeightGradient<T>{structure, samples<T>(call.input),
                              samples<T>(call.gradient, call.saved, call.activation),
                              call.needs_weight ? mutable_data<Working<T>>(values) : nullptr,
                              call.needs_bias ? mutable_data<Working<T>>(bias) : nullptr});
  const torch::headeronly::ScalarType dtype = call.input.scalar_type();
  values = in_dtype(values, dtype);
  const bool dense = call.needs_weight && call.weight.dim() == 2;
  return {dense ? scattered<T>(values, structure) : values, in_dtype(bias, dtype)};
}

}  // namespace tscnc
