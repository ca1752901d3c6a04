// What the algorithms of masked_linear on the CPU are given. All tensors are checked, but for the
// index, whose form is each algorithm's own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "cpu/masked_linear.h"

namespace tscnc {

constexpr char kMaskedLinear[] = "masked_linear";
// Multiply-adds that are worth a second thread.
constexpr int64_t kParallelWork = 1 << 18;

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

void panel_forward(const LinearForward& call);
void panel_input_gradient(const LinearInputGradient& call);
// The gradients of the weight, in its form, and of the bias; empty where they are not needed.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> panel_weight_gradient(
    const LinearWeightGradient& call);

void blocked_forward(const LinearForward& call);
void blocked_input_gradient(const LinearInputGradient& call);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> blocked_weight_gradient(
    const LinearWeightGradient& call);

void small_batch_forward(const LinearForward& call);
void spmv_forward(const LinearForward& call);
// Reads the rows' order: column_rows is the rows' columns, and permutation their row_pointers.
void small_batch_input_gradient(const LinearInputGradient& call);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> small_batch_weight_gradient(
    const LinearWeightGradient& call);

void block_forward(const LinearForward& call);
void block_input_gradient(const LinearInputGradient& call);

template <class T>
const T* data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Without torch's dispatcher, which costs a microsecond, where there is nothing to convert.
inline torch::stable::Tensor in_dtype(const torch::stable::Tensor& tensor,
                                      torch::headeronly::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
constexpr torch::headeronly::ScalarType kWorkingType =
    sizeof(Working<T>) == 8 ? torch::headeronly::ScalarType::Double
                            : torch::headeronly::ScalarType::Float;

// The weight's own checks, once the index has told how many entries are kept.
inline void check_weight(const torch::stable::Tensor& weight, int64_t rows, int64_t width,
                         int64_t kept) {
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.numel() == kept, kMaskedLinear, ": expected ", kept, " values, got ",
                    weight.numel());
  } else {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == width,
                    kMaskedLinear, ": expected weight to be a ", rows, " x ", width, " matrix");
  }
}

// Row-major values in the type that they are multiplied in.
template <class T>
torch::stable::Tensor working_values(const torch::stable::Tensor& values) {
  return in_dtype(values.is_contiguous() ? values : torch::stable::contiguous(values),
                  kWorkingType<T>);
}

template <class T>
Samples<T> samples(const torch::stable::Tensor& tensor) {
  return {data<T>(tensor),  tensor.size(0), tensor.size(1),  tensor.stride(0),
          tensor.stride(1), nullptr,        Activation::none};
}

template <class T>
Samples<T> samples(const torch::stable::Tensor& gradient, const torch::stable::Tensor& saved,
                   Activation activation) {
  Samples<T> result = samples<T>(gradient);
  result.activation = activation;
  if (activation != Activation::none) result.saved = data<T>(saved);
  return result;
}

}  // namespace tscnc
