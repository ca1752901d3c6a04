// Structural rank and dead rows and columns of a mask, for extreme_singular_values; Python side:
// tscnc_kernels/ops/extreme_singular_values.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "bipartite_matching.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (1 + rows + cols) int64: the rank, then 1 for every row and every column that keeps an entry.
Tensor structural_rank_cpu(Tensor mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(),
                  "structural_rank: expected a contiguous boolean matrix");
  const int64_t rows = mask.size(0), cols = mask.size(1);
  STD_TORCH_CHECK(std::max(rows, cols) <= std::numeric_limits<int32_t>::max(),
                  "structural_rank: more than 2^31 - 1 rows or columns");
  const bool* kept = static_cast<const bool*>(mask.const_data_ptr());
  Tensor result = torch::stable::empty({1 + rows + cols}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < 1 + rows + cols; ++i) out[i] = 0;
  std::vector<int64_t> begin(1, 0);
  std::vector<int32_t> neighbours;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      if (!kept[row * cols + col]) continue;
      out[1 + row] = out[1 + rows + col] = 1;
      neighbours.push_back(static_cast<int32_t>(col));
    }
    begin.push_back(static_cast<int64_t>(neighbours.size()));
  }
  out[0] = BipartiteMatching(begin, neighbours, cols).size();
  return result;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) { m.def("structural_rank(Tensor mask) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("structural_rank", TORCH_BOX(&tscnc::structural_rank_cpu));
}
