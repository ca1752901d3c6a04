// masked_linear on the CPU with a blocked index (csrc/include/blocked_index.h). All tensors are
// checked, but for the index and the size of the weight.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/masked_linear.h"

namespace tscnc {

// output = act(input (W o M)^T + bias); the preactivation is filled unless it has no rows.
struct LinearForward {
  torch::stable::Tensor input, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor row_pointers, columns;
  Activation activation;
  torch::stable::Tensor output, preactivation;
};

// result = G (W o M), G the gradient times the activation's derivative.
struct LinearInputGradient {
  torch::stable::Tensor gradient, saved, weight;
  torch::stable::Tensor column_pointers, column_rows, permutation;
  Activation activation;
  torch::stable::Tensor result;
};

struct LinearWeightGradient {
  torch::stable::Tensor gradient, saved, input, weight;
  torch::stable::Tensor row_pointers, columns;
  Activation activation;
  bool needs_weight, needs_bias;
};

// The directions of a backward pass; those that are needed have a blocked index.
struct BlockedBackward {
  LinearInputGradient input;
  LinearWeightGradient weight;
  bool needs_input;
};

// Output and preactivation; the index stands where the other algorithms have columns.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> blocked_linear(
    const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias, const torch::stable::Tensor& row_pointers,
    const torch::stable::Tensor& index, int64_t activation, bool save_preactivation,
    bool feature_major);

// Gradients of input, weight (in its form) and bias; empty where they are not needed.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
blocked_linear_backward(BlockedBackward call);

}  // namespace tscnc
