// The products of block patterns on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/masked_linear_block.h"
#include "scratch.h"

namespace tscnc {

inline bool same_columns(const SparseRows& structure, int64_t row, int64_t other) {
  const int32_t* pointers = structure.pointers;
  const int64_t count = pointers[row + 1] - pointers[row];
  if (pointers[other + 1] - pointers[other] != count) return false;
  // Without any entry there may be no columns to point to.
  return count == 0 ||
         std::memcmp(structure.columns + pointers[row], structure.columns + pointers[other],
                     static_cast<size_t>(count) * sizeof(int32_t)) == 0;
}

// First rows of the groups, then the number of rows. Whatever the pattern, the groups are right:
// where no rows agree, each is a group of its own.
inline std::vector<int32_t> row_group_starts(const SparseRows& structure) {
  std::vector<int32_t> starts;
  starts.reserve(static_cast<size_t>(structure.rows) + 1);
  for (int64_t row = 0; row < structure.rows;) {
    starts.push_back(static_cast<int32_t>(row));
    int64_t next = row + 1;
    while (next < structure.rows && next - row < kMaxGroupRows &&
           same_columns(structure, row, next)) {
      ++next;
    }
    const int64_t grouped = (next - row) / kGroupRows * kGroupRows;
    row += std::max<int64_t>(1, grouped);
  }
  starts.push_back(static_cast<int32_t>(structure.rows));
  return starts;
}

inline RowGroups row_groups(const std::vector<int32_t>& starts) {
  return {starts.data(), static_cast<int64_t>(starts.size()) - 1};
}

// One parallel region: panels of samples, and also ranges of rows where there are fewer panels than
// threads.
template <class T>
void run_block_product(MaskedProduct<T> call) {
  if (call.input.count == 0) return;
  const std::vector<int32_t> starts = row_group_starts(call.structure);
  const int64_t lanes = TSCNC_SELECT(block_lanes<T>)();
  const int64_t panels = (call.input.count + lanes - 1) / lanes;
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits = panels < threads ? (threads + panels - 1) / panels : 1;
  const auto kernel = TSCNC_SELECT(block_product<T>);
  const int64_t size = TSCNC_SELECT(block_scratch<T>)(call.structure.width);
  torch::stable::parallel_for(0, panels * call.row_splits, 1, [&](int64_t begin, int64_t end) {
    kernel(call, row_groups(starts), begin, end, thread_scratch().reserve<Working<T>>(size));
  });
}

}  // namespace tscnc
