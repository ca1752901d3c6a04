// What memory safety needs from a tensor, with errors that name the op. Python has checked the
// rest.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace tscnc {

// A non-empty list of contiguous tensors of one dtype on one device.
inline void check_list(const char* op, const std::vector<torch::stable::Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), op, ": expected at least one tensor, got an empty list");
  for (const auto& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": expected contiguous tensors");
    STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), op,
                    ": expected tensors of one dtype");
    STD_TORCH_CHECK(tensor.device() == tensors[0].device(), op, ": expected tensors on one device");
  }
}

}  // namespace tscnc
