// One switch from torch's scalar types to the kernels' storage types.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "storage_types.h"

namespace tscnc {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>{}) with T = float, double, bf16 or fp16.
template <class Function>
auto dispatch_floating(const char* op, torch::headeronly::ScalarType dtype,
                       const Function& function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return function(TypeTag<float>{});
    case ScalarType::Double:
      return function(TypeTag<double>{});
    case ScalarType::BFloat16:
      return function(TypeTag<bf16>{});
    case ScalarType::Half:
      return function(TypeTag<fp16>{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace tscnc
