// Argument checks of masked_linear on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "activation.h"

namespace tscnc {

constexpr char kMaskedLinear[] = "masked_linear";

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Activation::gelu), kMaskedLinear,
                  ": expected an activation code from 0 to 2, got ", code);
  return static_cast<Activation>(code);
}

inline void check_matrix(const torch::stable::Tensor& tensor, int64_t rows, int64_t width,
                         torch::headeronly::ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows &&
                      tensor.size(1) == width && tensor.scalar_type() == dtype,
                  kMaskedLinear, ": expected ", name, " to be a ", rows, " x ", width,
                  " CPU matrix of the input's dtype");
}

inline void check_operands(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                           const std::optional<torch::stable::Tensor>& bias, int64_t rows) {
  const torch::headeronly::ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == dtype, kMaskedLinear,
                  ": weight and input differ in dtype or device");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->is_contiguous() &&
                        bias->numel() == rows && bias->scalar_type() == dtype,
                    kMaskedLinear, ": expected bias to be ", rows, " contiguous entries");
  }
}

}  // namespace tscnc
