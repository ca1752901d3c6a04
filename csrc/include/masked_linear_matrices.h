// The matrices of samples that masked_linear reads and writes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "cpu/masked_linear.h"

namespace tscnc {

// An uninitialised CPU tensor. Without torch's dispatcher, whose boxed call costs a microsecond.
inline torch::stable::Tensor new_strided(std::initializer_list<int64_t> sizes,
                                         std::initializer_list<int64_t> strides,
                                         torch::headeronly::ScalarType dtype) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &result));
  return torch::stable::Tensor(result);
}

inline torch::stable::Tensor new_vector(int64_t size, torch::headeronly::ScalarType dtype) {
  return new_strided({size}, {1}, dtype);
}

inline torch::stable::Tensor new_zero_vector(int64_t size, torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor vector = new_vector(size, dtype);
  if (size > 0) {
    std::memset(vector.mutable_data_ptr(), 0, static_cast<size_t>(size) * vector.element_size());
  }
  return vector;
}

// An uninitialised (rows, width) matrix: row-major, or feature-major, the transpose of a row-major
// one.
inline torch::stable::Tensor new_matrix(int64_t rows, int64_t width,
                                        torch::headeronly::ScalarType dtype, bool feature_major) {
  if (feature_major) return new_strided({rows, width}, {1, std::max<int64_t>(rows, 1)}, dtype);
  return new_strided({rows, width}, {std::max<int64_t>(width, 1), 1}, dtype);
}

// Whether the samples of a feature lie next to each other and not its features.
inline bool is_feature_major(const torch::stable::Tensor& matrix) {
  return matrix.stride(0) == 1 && !matrix.is_contiguous();
}

template <class T>
Results<T> results(const torch::stable::Tensor& matrix) {
  return {static_cast<T*>(matrix.mutable_data_ptr()), matrix.stride(0), matrix.stride(1)};
}

template <class T>
Samples<T> samples(const torch::stable::Tensor& matrix) {
  return {static_cast<const T*>(matrix.const_data_ptr()),
          matrix.size(0),
          matrix.size(1),
          matrix.stride(0),
          matrix.stride(1),
          nullptr,
          0,
          0,
          Activation::none};
}

// A gradient times the activation's derivative, for which `saved` is kept; without activation it
// may be anything.
template <class T>
Samples<T> samples(const torch::stable::Tensor& gradient, const torch::stable::Tensor& saved,
                   Activation activation) {
  Samples<T> result = samples<T>(gradient);
  if (activation == Activation::none) return result;
  result.saved = static_cast<const T*>(saved.const_data_ptr());
  result.saved_sample_stride = saved.stride(0);
  result.saved_feature_stride = saved.stride(1);
  result.activation = activation;
  return result;
}

}  // namespace tscnc
