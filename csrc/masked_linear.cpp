// masked_linear on the CPU; Python side and formula: tscnc_kernels/ops/masked_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <optional>
#include <tuple>

#include "masked_linear_algorithms.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "masked_linear";

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::gelu), kOp,
                  ": expected an activation code from 0 to 2, got ", code);
  return static_cast<Activation>(code);
}

// In the order of their codes in tscnc_kernels/_masked_algorithms.py.
constexpr struct {
  void (*forward)(const LinearForward&);
  void (*input_gradient)(const LinearInputGradient&);
  std::tuple<Tensor, Tensor> (*weight_gradient)(const LinearWeightGradient&);
} kAlgorithms[] = {
    {panel_forward, panel_input_gradient, panel_weight_gradient},
    {blocked_forward, blocked_input_gradient, blocked_weight_gradient},
    {small_batch_forward, small_batch_input_gradient, small_batch_weight_gradient},
    {spmv_forward, small_batch_input_gradient, small_batch_weight_gradient},
    {block_forward, block_input_gradient, panel_weight_gradient},
};

const auto& algorithm_of(int64_t code) {
  constexpr int64_t kCount = std::size(kAlgorithms);
  STD_TORCH_CHECK(code >= 0 && code < kCount, kOp, ": expected an algorithm code from 0 to ",
                  kCount - 1, ", got ", code);
  return kAlgorithms[code];
}

void check_matrix(const Tensor& tensor, int64_t rows, int64_t width, ScalarType dtype,
                  const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows &&
                      tensor.size(1) == width && tensor.scalar_type() == dtype,
                  kOp, ": expected ", name, " to be a ", rows, " x ", width,
                  " CPU matrix of the input's dtype");
}

// Rows of the pattern.
int64_t check_operands(const Tensor& input, const Tensor& weight, const Tensor& row_pointers) {
  STD_TORCH_CHECK(input.dim() == 2 && input.is_cpu(), kOp,
                  ": expected input to be a CPU matrix, got ", input.dim(), " dimensions");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == input.scalar_type(), kOp,
                  ": weight and input differ in dtype or device");
  STD_TORCH_CHECK(row_pointers.numel() >= 2, kOp,
                  ": expected row_pointers of at least one row, got none");
  return row_pointers.numel() - 1;
}

std::tuple<Tensor, Tensor> masked_linear_cpu(Tensor input, Tensor weight,
                                             std::optional<Tensor> bias, Tensor row_pointers,
                                             Tensor columns, int64_t activation, int64_t algorithm,
                                             bool save_preactivation) {
  const int64_t rows = check_operands(input, weight, row_pointers);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->is_contiguous() &&
                        bias->numel() == rows && bias->scalar_type() == input.scalar_type(),
                    kOp, ": expected bias to be ", rows, " contiguous entries");
  }
  const int64_t saved_rows = save_preactivation ? input.size(0) : 0;
  const LinearForward call{input,
                           weight,
                           bias,
                           row_pointers,
                           columns,
                           activation_of(activation),
                           torch::stable::new_empty(input, {input.size(0), rows}),
                           torch::stable::new_empty(input, {saved_rows, rows})};
  algorithm_of(algorithm).forward(call);
  return {call.output, call.preactivation};
}

// `saved` is the output for relu and the preactivation for gelu. A gradient that is not needed
// comes back empty.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward_cpu(
    Tensor grad_output, Tensor saved, Tensor input, Tensor weight, Tensor row_pointers,
    Tensor columns, Tensor column_pointers, Tensor column_rows, Tensor permutation,
    int64_t activation, int64_t input_algorithm, int64_t weight_algorithm, bool needs_input,
    bool needs_weight, bool needs_bias) {
  const int64_t rows = check_operands(input, weight, row_pointers), count = input.size(0);
  const ScalarType dtype = input.scalar_type();
  const Activation act = activation_of(activation);
  check_matrix(grad_output, count, rows, dtype, "grad_output");
  STD_TORCH_CHECK(column_pointers.numel() == input.size(1) + 1, kOp,
                  ": expected column_pointers of ", input.size(1) + 1, " entries, got ",
                  column_pointers.numel());
  if (act != Activation::none) {
    check_matrix(saved, count, rows, dtype, "saved");
    STD_TORCH_CHECK(saved.is_contiguous(), kOp, ": expected saved to be contiguous");
  }
  Tensor grad_input = torch::stable::new_empty(input, {0});
  Tensor grad_weight = grad_input, grad_bias = grad_input;
  if (needs_input) {
    grad_input = torch::stable::new_empty(input, {count, input.size(1)});
    const LinearInputGradient call{grad_output, saved,       weight, column_pointers,
                                   column_rows, permutation, act,    grad_input};
    algorithm_of(input_algorithm).input_gradient(call);
  }
  if (needs_weight || needs_bias) {
    const LinearWeightGradient call{grad_output, saved, input,        weight,    row_pointers,
                                    columns,     act,   needs_weight, needs_bias};
    std::tie(grad_weight, grad_bias) = algorithm_of(weight_algorithm).weight_gradient(call);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "masked_linear(Tensor input, Tensor weight, Tensor? bias, Tensor row_pointers, "
      "Tensor columns, int activation, int algorithm, bool save_preactivation) -> "
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
