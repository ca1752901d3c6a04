// The kept entries of a weight, to and from the form that its user holds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/masked_linear.h"

namespace tscnc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
constexpr ScalarType working_type() {
  return sizeof(Working<T>) == 8 ? ScalarType::Double : ScalarType::Float;
}

// The kept entries of a dense weight, or the values themselves, in the type that they are
// multiplied in.
template <class T>
Tensor kept_values(const char* op, const Tensor& weight, const SparseRows& structure) {
  const int64_t kept = structure.pointers[structure.rows];
  const Tensor flat = torch::stable::contiguous(weight);
  if (weight.dim() == 1) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.numel() == kept, op, ": expected ", kept,
                    " values, got ", weight.numel());
    return in_dtype(flat, working_type<T>());
  }
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(0) == structure.rows &&
                      weight.numel() == structure.rows * structure.width,
                  op, ": expected a weight of the pattern's shape");
  Tensor values = torch::stable::new_empty(weight, {kept});
  const T* source = data<T>(flat);
  T* target = mutable_data<T>(values);
  for (int64_t row = 0; row < structure.rows; ++row, source += structure.width) {
    for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[j] = source[structure.columns[j]];
    }
  }
  return in_dtype(values, working_type<T>());
}

// The weight's gradient in the weight's form: values, or a dense weight that is zero elsewhere.
template <class T>
Tensor like_weight(const Tensor& values, const Tensor& weight, const SparseRows& structure) {
  if (weight.dim() == 1) return values;
  Tensor dense = torch::stable::new_zeros(
      values, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  const T* source = data<T>(values);
  T* target = mutable_data<T>(dense);
  for (int64_t row = 0; row < structure.rows; ++row, target += structure.width) {
    for (int32_t j = structure.pointers[row]; j < structure.pointers[row + 1]; ++j) {
      target[structure.columns[j]] = source[j];
    }
  }
  return dense;
}

}  // namespace tscnc
