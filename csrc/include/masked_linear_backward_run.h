// Both gradients of a masked product on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/masked_linear_backward.h"
#include "scratch.h"

namespace tscnc {

// Ranges of rows of the transposed structure with about equal numbers of kept entries, and ranges
// of the bias's gradient; each sums over the batch in order.
template <class T>
void run_backward(const MaskedBackward<T>& call) {
  // Multiply-adds that are worth another thread, which packs the output's gradient once more.
  constexpr int64_t kWorkOfThread = 1 << 18;
  const SparseRows& structure = call.transposed;
  const int64_t work = 2 * structure.pointers[structure.rows] * call.input.count;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kWorkOfThread, 1, threads);
  const auto kernel = TSCNC_SELECT(masked_linear_backward<T>);
  const int64_t size = TSCNC_SELECT(masked_linear_backward_scratch<T>)(structure.width);
  const auto first_row = [&](int64_t part) {
    return part == parts ? structure.rows : row_split(structure, part, parts);
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    kernel(call, first_row(begin), first_row(end), structure.width * begin / parts,
           structure.width * end / parts, thread_scratch().reserve<Working<T>>(size));
  });
}

}  // namespace tscnc
