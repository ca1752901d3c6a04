// What memory safety needs from the tensors of a sparse product on CUDA. The index is on the GPU
// and stays unread, so that nothing waits for it: SparsityPattern has built it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/masked_linear.h"

namespace tscnc {

inline void check_on_device(const char* op, const torch::stable::Tensor& tensor,
                            const torch::stable::Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": expected ", name,
                  " on the device of the other tensors");
}

inline const int32_t* index_on_device(const char* op, const torch::stable::Tensor& index,
                                      const torch::stable::Tensor& like, int64_t size,
                                      const char* name) {
  check_on_device(op, index, like, name);
  STD_TORCH_CHECK(index.is_contiguous() && index.numel() == size &&
                      index.scalar_type() == torch::headeronly::ScalarType::Int,
                  op, ": expected ", name, " to be ", size, " contiguous int32 entries, got ",
                  index.numel());
  return static_cast<const int32_t*>(index.const_data_ptr());
}

inline cuda::KeptEntries kept_on_device(const char* op, const torch::stable::Tensor& pointers,
                                        const torch::stable::Tensor& columns, int64_t width,
                                        const torch::stable::Tensor& like,
                                        const char* pointers_name, const char* columns_name) {
  const int64_t rows = pointers.numel() - 1;
  STD_TORCH_CHECK(rows >= 1, op, ": expected ", pointers_name, " of at least one row");
  return {index_on_device(op, pointers, like, rows + 1, pointers_name),
          index_on_device(op, columns, like, columns.numel(), columns_name), rows, width,
          columns.numel()};
}

inline DType cuda_dtype(const char* op, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  op, ": expected float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(type));
  return static_cast<DType>(type);
}

}  // namespace tscnc
