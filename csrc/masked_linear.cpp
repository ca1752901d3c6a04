// masked_linear on the CPU; Python side and formula: tscnc_kernels/ops/masked_linear.py.
#include "cpu/masked_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "dtype_dispatch.h"
#include "masked_linear_backward_run.h"
#include "masked_linear_block_run.h"
#include "masked_linear_blocked.h"
#include "masked_linear_checks.h"
#include "masked_linear_matrices.h"
#include "masked_linear_small_run.h"
#include "panel_product.h"
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

// Without torch's dispatcher, which costs a microsecond, where there is nothing to convert.
Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// `checked`: every column is looked at here, for kernels that do not check what they read. Columns
// in 16 bits, only for kernels that take them apart, are left out.
SparseRows sparse_rows(const Tensor& pointers, const Tensor& columns, int64_t width,
                       const char* pointers_name, const char* columns_name, bool checked = true,
                       bool narrow = false) {
  const int64_t kept = columns.numel();
  const int32_t* begin = pointer_data(kOp, pointers, kept, pointers_name);
  STD_TORCH_CHECK(pointers.numel() >= 2, kOp, ": expected ", pointers_name, " of at least one row");
  const int32_t* entries = nullptr;
  if (!narrow) {
    entries = checked ? bounded_index(kOp, columns, kept, width, columns_name)
                      : index_data(kOp, columns, kept, columns_name);
  }
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

// Codes of tscnc_kernels/_masked_algorithms.py.
enum class Algorithm : int64_t { panel = 0, blocked = 1, small_batch = 2, spmv = 3, block = 4 };

Algorithm algorithm_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 4, kOp, ": expected an algorithm code from 0 to 4, got ",
                  code);
  return static_cast<Algorithm>(code);
}

// Kernels for few samples keep their reads inside by themselves and need no transposed index.
bool is_small(Algorithm algorithm) {
  return algorithm == Algorithm::small_batch || algorithm == Algorithm::spmv;
}

// The kept entries of a dense weight, or the values themselves, in the type that they are
// multiplied in.
template <class T>
Tensor kept_values(const Tensor& weight, const SparseRows& structure) {
  constexpr ScalarType working = sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t kept = structure.pointers[structure.rows];
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.numel() == kept, kOp, ": expected ", kept,
                    " values, got ", weight.numel());
    return in_dtype(weight.is_contiguous() ? weight : torch::stable::contiguous(weight), working);
  }
  check_matrix(weight, structure.rows, structure.width, weight.scalar_type(), "weight");
  const Tensor values = new_vector(kept, weight.scalar_type());
  const T* source = data<T>(weight);
  T* target = static_cast<T*>(values.mutable_data_ptr());
  const int64_t row_stride = weight.stride(0), column_stride = weight.stride(1);
  for_rows(structure, [&](int64_t row) {
    const T* entries = source + row * row_stride;
    for (int64_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[j] = entries[structure.columns[j] * column_stride];
    }
  });
  return in_dtype(values, working);
}

// A dense matrix that is zero where no entry is kept.
template <class T>
Tensor scattered(const Tensor& values, const SparseRows& structure) {
  Tensor matrix = torch::stable::new_zeros(values, {structure.rows, structure.width});
  const T* source = data<T>(values);
  T* target = static_cast<T*>(matrix.mutable_data_ptr());
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
  const PanelProduct<T> kernel = panel_product<T>();
  const int64_t lanes = kernel.lanes();
  const int64_t panels = (call.input.count + lanes - 1) / lanes;
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits = panels < threads ? (threads + panels - 1) / panels : 1;
  const int64_t work =
      (call.structure.pointers[call.structure.rows] + call.structure.width + call.structure.rows) *
      lanes / call.row_splits;
  const int64_t size = kernel.scratch(call.structure.width);
  torch::stable::parallel_for(0, panels * call.row_splits,
                              std::max<int64_t>(1, kParallelWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                auto* scratch = thread_scratch().reserve<Working<T>>(size);
                                kernel.run(call, begin, end, scratch);
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

std::tuple<Tensor, Tensor> masked_linear_cpu(Tensor input, Tensor weight,
                                             std::optional<Tensor> bias, Tensor row_pointers,
                                             Tensor columns, int64_t activation, int64_t algorithm,
                                             bool save_preactivation, bool feature_major) {
  const Algorithm chosen = algorithm_of(algorithm);
  STD_TORCH_CHECK(input.dim() == 2, kOp, ": expected input to be a matrix, got ", input.dim(),
                  " dimensions");
  if (chosen == Algorithm::blocked) {
    return blocked_linear(input, weight, bias, row_pointers, columns, activation,
                          save_preactivation, feature_major);
  }
  // Where a dense weight's entries have to be picked, the columns must be whole and checked.
  const bool checked = !is_small(chosen) || weight.dim() == 2;
  const bool narrow =
      chosen == Algorithm::spmv && !checked && columns.scalar_type() == ScalarType::UInt16;
  STD_TORCH_CHECK(!narrow || (columns.is_cpu() && columns.is_contiguous()), kOp,
                  ": expected contiguous columns on the CPU");
  const SparseRows structure =
      sparse_rows(row_pointers, columns, input.size(1), "row_pointers", "columns", checked, narrow);
  const Activation act = activation_of(activation);
  const ScalarType dtype = input.scalar_type();
  check_matrix(input, input.size(0), structure.width, dtype, "input");
  check_operands(input, weight, bias, structure.rows);
  const Tensor output = new_matrix(input.size(0), structure.rows, dtype, feature_major);
  const Tensor preactivation =
      new_matrix(save_preactivation ? input.size(0) : 0, structure.rows, dtype, feature_major);
  dispatch_floating(kOp, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = kept_values<T>(weight, structure);
    const MaskedProduct<T> call = {structure,
                                   data<Working<T>>(values),
                                   samples<T>(input),
                                   bias.has_value() ? data<T>(*bias) : nullptr,
                                   act,
                                   results<T>(output),
                                   save_preactivation ? results<T>(preactivation) : Results<T>{},
                                   1};
    if (chosen == Algorithm::spmv)
      return run_spmv<T>(call, narrow ? data<uint16_t>(columns) : nullptr);
    if (chosen == Algorithm::small_batch) return run_small_product<T>(call);
    chosen == Algorithm::block ? run_block_product<T>(call) : run_product<T>(call);
  });
  return {output, preactivation};
}

// The permutation is null where the algorithm needs no transposed index.
struct Structure {
  SparseRows rows, transposed;
  const int32_t* permutation;
};

// Row-major values in the order of the transposed index, or the inverse.
template <class T>
Tensor reordered(const Tensor& values, const Structure& structure, bool inverse) {
  const Tensor ordered = new_vector(values.numel(), values.scalar_type());
  const auto* source = data<Working<T>>(values);
  auto* target = static_cast<Working<T>*>(ordered.mutable_data_ptr());
  const int32_t* order = structure.permutation;
  torch::stable::parallel_for(0, values.numel(), kParallelMoves, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      target[inverse ? order[j] : j] = source[inverse ? j : order[j]];
    }
  });
  return ordered;
}

template <class T>
Tensor input_gradient(const Structure& structure, const Tensor& weight, const Samples<T>& gradient,
                      Algorithm algorithm, const Tensor& like) {
  const Tensor values = kept_values<T>(weight, structure.rows);
  if (structure.permutation == nullptr) {
    const Tensor result = new_matrix(gradient.count, structure.rows.width, like.scalar_type(),
                                     is_feature_major(like));
    run_small_input_gradient<T>(
        {structure.rows, data<Working<T>>(values), gradient, results<T>(result)},
        structure.transposed);
    return result;
  }
  const Tensor ordered = reordered<T>(values, structure, false);
  const SparseRows& transposed = structure.transposed;
  const Tensor result =
      new_matrix(gradient.count, transposed.rows, like.scalar_type(), is_feature_major(like));
  const MaskedProduct<T> call = {transposed,       data<Working<T>>(ordered), gradient, nullptr,
                                 Activation::none, results<T>(result),        {},       1};
  algorithm == Algorithm::block ? run_block_product<T>(call) : run_product<T>(call);
  return result;
}

// Row-major values of the weight's dtype, or a dense matrix where the weight is one.
template <class T>
Tensor in_form_of(const Tensor& weight, const Tensor& values, const SparseRows& structure,
                  bool needed) {
  const Tensor converted = in_dtype(values, weight.scalar_type());
  return needed && weight.dim() == 2 ? scattered<T>(converted, structure) : converted;
}

template <class T>
std::tuple<Tensor, Tensor> weight_gradient(const SparseRows& structure, const Tensor& weight,
                                           const Samples<T>& gradient, const Tensor& input,
                                           Algorithm algorithm, bool needs_weight,
                                           bool needs_bias) {
  constexpr ScalarType working = sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t kept = needs_weight ? structure.pointers[structure.rows] : 0;
  const bool small = is_small(algorithm) && gradient.count > 0;
  Tensor values = small ? new_vector(kept, working) : new_zero_vector(kept, working);
  Tensor bias = new_zero_vector(needs_bias ? structure.rows : 0, working);
  const MaskedWeightGradient<T> call = {
      structure, samples<T>(input), gradient,
      needs_weight ? static_cast<Working<T>*>(values.mutable_data_ptr()) : nullptr,
      needs_bias ? static_cast<Working<T>*>(bias.mutable_data_ptr()) : nullptr};
  small ? run_small_weight_gradient<T>(call) : run_weight_gradient<T>(call);
  values = in_form_of<T>(weight, values, structure, needs_weight);
  return {values, in_dtype(bias, input.scalar_type())};
}

// Both gradients by panels in one pass, and that of the bias.
template <class T>
std::tuple<Tensor, Tensor, Tensor> all_gradients(const Structure& structure, const Tensor& weight,
                                                 const Samples<T>& gradient, const Tensor& input,
                                                 bool needs_bias) {
  constexpr ScalarType working = sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor values = reordered<T>(kept_values<T>(weight, structure.rows), structure, false);
  const Tensor found = new_zero_vector(values.numel(), working);
  const Tensor bias = new_zero_vector(needs_bias ? structure.rows.rows : 0, working);
  const Tensor result = new_matrix(gradient.count, structure.rows.width, input.scalar_type(),
                                   is_feature_major(input));
  run_backward<T>({structure.transposed, data<Working<T>>(values), samples<T>(input), gradient,
                   results<T>(result), static_cast<Working<T>*>(found.mutable_data_ptr()),
                   needs_bias ? static_cast<Working<T>*>(bias.mutable_data_ptr()) : nullptr});
  return {result, in_form_of<T>(weight, reordered<T>(found, structure, true), structure.rows, true),
          in_dtype(bias, input.scalar_type())};
}

// `saved` is the output for relu and the preactivation for gelu. A gradient that is not needed
// comes back empty. The needed directions are all blocked or none is; two by panels are computed in
// one pass.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward_cpu(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, Tensor column_pointers, Tensor column_rows, Tensor permutation,
    int64_t activation, int64_t input_algorithm, int64_t weight_algorithm, bool needs_input,
    bool needs_weight, bool needs_bias) {
  const Algorithm input_chosen = algorithm_of(input_algorithm);
  const Algorithm weight_chosen = algorithm_of(weight_algorithm);
  STD_TORCH_CHECK(input.dim() == 2, kOp, ": expected input to be a matrix, got ", input.dim(),
                  " dimensions");
  const bool needs_rows = needs_weight || needs_bias;
  const bool blocked = (needs_input && input_chosen == Algorithm::blocked) ||
                       (needs_rows && weight_chosen == Algorithm::blocked);
  if (blocked) {
    STD_TORCH_CHECK((!needs_input || input_chosen == Algorithm::blocked) &&
                        (!needs_rows || weight_chosen == Algorithm::blocked),
                    kOp, ": expected both directions to be blocked or none");
    const Activation act = activation_of(activation);
    return blocked_linear_backward(
        {{grad_output, saved, weight, column_pointers, column_rows, permutation, act, input},
         {grad_output, saved, input, weight, row_pointers, columns, act, needs_weight, needs_bias},
         needs_input});
  }
  const bool permuted = needs_input && !is_small(input_chosen);
  const bool checked = weight.dim() == 2 || permuted || !is_small(weight_chosen);
  const SparseRows rows =
      sparse_rows(row_pointers, columns, input.size(1), "row_pointers", "columns", checked);
  const SparseRows transposed = sparse_rows(column_pointers, column_rows, rows.rows,
                                            "column_pointers", "column_rows", permuted);
  const int64_t count = input.size(0), kept = columns.numel();
  const int32_t* order =
      permuted ? bounded_index(kOp, permutation, kept, kept, "permutation") : nullptr;
  const Activation act = activation_of(activation);
  STD_TORCH_CHECK(column_rows.numel() == kept && transposed.rows == rows.width, kOp,
                  ": the two orders of the pattern do not agree");
  const ScalarType dtype = input.scalar_type();
  check_matrix(input, count, rows.width, dtype, "input");
  check_matrix(grad_output, count, rows.rows, dtype, "grad_output");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, kOp, ": weight and input differ in dtype");
  const bool scaled = act != Activation::none;
  if (scaled) check_matrix(saved, count, rows.rows, dtype, "saved");
  Tensor grad_input = input, grad_weight = input, grad_bias = input;
  if (!needs_input || !needs_rows) {
    const Tensor none = new_vector(0, dtype);
    if (!needs_input) grad_input = none;
    if (!needs_rows) grad_weight = grad_bias = none;
  }
  const bool together = needs_input && needs_weight && count > 0 &&
                        input_chosen == Algorithm::panel && weight_chosen == Algorithm::panel;
  dispatch_floating(kOp, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Samples<T> gradient = samples<T>(grad_output, saved, act);
    if (together) {
      std::tie(grad_input, grad_weight, grad_bias) =
          all_gradients<T>({rows, transposed, order}, weight, gradient, input, needs_bias);
      return;
    }
    if (needs_input) {
      grad_input =
          input_gradient<T>({rows, transposed, order}, weight, gradient, input_chosen, input);
    }
    if (!needs_rows) return;
    std::tie(grad_weight, grad_bias) =
        weight_gradient<T>(rows, weight, gradient, input, weight_chosen, needs_weight, needs_bias);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_linear(Tensor input, Tensor weight, Tensor? bias, Tensor row_pointers, "
      "Tensor columns, int activation, int algorithm, bool save_preactivation, "
      "bool feature_major=False) -> "
      "(Tensor output, Tensor preactivation)");
  m.def(
      "masked_linear_bitmap(Tensor input, Tensor values, Tensor? bias, Tensor bits, Tensor starts, "
      "int activation, bool save_preactivation, bool feature_major) -> "
      "(Tensor output, Tensor preactivation)");
  m.def(
      "masked_linear_backward(Tensor grad_output, Tensor saved, Tensor input, Tensor weight, "
      "Tensor row_pointers, Tensor columns, Tensor column_pointers, Tensor column_rows, "
      "Tensor permutation, int activation, int input_algorithm, int weight_algorithm, "
      "bool needs_input, bool needs_weight, bool needs_bias) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&tscnc::masked_linear_cpu));
  m.impl("masked_linear_backward", TORCH_BOX(&tscnc::masked_linear_backward_cpu));
}
