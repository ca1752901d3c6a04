// Packs a mask and builds the index of a SparsityPattern on CUDA; Python side:
// tscnc_kernels/sparsity.py.
#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "cuda/sparsity.h"
#include "cuda_stream.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor sparsity_pack_cuda(const Tensor& mask) {
  constexpr char kOp[] = "sparsity_pack";
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool, kOp,
                  ": expected a contiguous boolean mask");
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  const int64_t count = mask.numel();
  Tensor bits = torch::stable::new_empty(mask, {(count + 7) / 8}, ScalarType::Byte);
  check_cuda(cuda::launch_pack_mask(static_cast<const bool*>(mask.const_data_ptr()), count,
                                    static_cast<uint8_t*>(bits.mutable_data_ptr()),
                                    current_cuda_stream(mask.get_device_index())),
             kOp);
  return bits;
}

// Waits for the stream: the size of the index has to be known before its memory is taken.
int64_t read_count(const Tensor& count, cudaStream_t stream, const char* op) {
  int64_t value = 0;
  check_cuda(cudaMemcpyAsync(&value, count.const_data_ptr(), sizeof(value), cudaMemcpyDeviceToHost,
                             stream),
             op);
  check_cuda(cudaStreamSynchronize(stream), op);
  return value;
}

// Bits behind the last entry must be zero, as SparsityPattern makes them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparsity_build_cuda(const Tensor& bits,
                                                                       int64_t rows,
                                                                       int64_t width) {
  constexpr char kOp[] = "sparsity_build";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(rows > 0 && width > 0 && rows < kMost && width < kMost, kOp,
                  ": expected from 1 to 2^31 - 2 rows and columns, got ", rows, " x ", width);
  STD_TORCH_CHECK(bits.is_contiguous() && bits.scalar_type() == ScalarType::Byte &&
                      bits.numel() == (rows * width + 7) / 8,
                  kOp, ": expected contiguous uint8 bits for ", rows, " x ", width,
                  " entries, got ", bits.numel(), " bytes");
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  const cudaStream_t stream = current_cuda_stream(bits.get_device_index());
  const auto new_index = [&](int64_t size) {
    return torch::stable::new_empty(bits, {size}, ScalarType::Int);
  };
  const auto data = [](const Tensor& index) {
    return static_cast<int32_t*>(index.mutable_data_ptr());
  };
  const Tensor row_pointers = new_index(rows + 1), column_pointers = new_index(width + 1);
  const Tensor workspace = new_index(cuda::pattern_workspace_length(rows, width));
  const Tensor count = torch::stable::new_empty(bits, {1}, ScalarType::Long);
  cuda::PatternIndex index = {static_cast<const uint8_t*>(bits.const_data_ptr()),
                              rows,
                              width,
                              data(row_pointers),
                              data(column_pointers),
                              nullptr,
                              nullptr,
                              nullptr,
                              data(workspace)};
  check_cuda(
      cuda::launch_pattern_counts(index, static_cast<int64_t*>(count.mutable_data_ptr()), stream),
      kOp);
  const int64_t kept = read_count(count, stream, kOp);
  STD_TORCH_CHECK(kept <= kMost, kOp, ": more than 2^31 - 1 kept entries, got ", kept);
  const Tensor columns = new_index(kept), column_rows = new_index(kept);
  const Tensor permutation = new_index(kept);
  index.columns = data(columns);
  index.column_rows = data(column_rows);
  index.permutation = data(permutation);
  check_cuda(cuda::launch_pattern_lists(index, kept, stream), kOp);
  return {row_pointers, columns, column_pointers, column_rows, permutation};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("sparsity_pack", TORCH_BOX(&tscnc::sparsity_pack_cuda));
  m.impl("sparsity_build", TORCH_BOX(&tscnc::sparsity_build_cuda));
}
#endif
