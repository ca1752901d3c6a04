// The products of few samples on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/masked_linear_small.h"
#include "scratch.h"

namespace tscnc {

// Runs kernel(begin, end, scratch) on the ranges that split(part, parts) cuts, with scratch of at
// least `least` elements.
template <class T, class Split, class Kernel>
void run_in_parts(const SparseRows& structure, int64_t samples, const Split& split,
                  const Kernel& kernel, int64_t least = 0) {
  constexpr int64_t kWorkOfThread = 1 << 17;
  const int64_t work = structure.pointers[structure.rows] * samples;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kWorkOfThread, 1, threads);
  const int64_t size =
      std::max(least, TSCNC_SELECT(small_batch_scratch<T>)(structure.rows, structure.width));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = split(first, parts), end = split(last, parts);
    if (begin < end) kernel(begin, end, thread_scratch().reserve<Working<T>>(size));
  });
}

// The first of `rows` rows of part `part`; the last part ends behind trailing empty rows.
inline int64_t part_begin(const SparseRows& structure, int64_t part, int64_t parts) {
  return part == parts ? structure.rows : row_split(structure, part, parts);
}

template <class T>
void run_small_product(const MaskedProduct<T>& call) {
  const auto kernel = TSCNC_SELECT(small_batch_product<T>);
  run_in_parts<T>(
      call.structure, call.input.count,
      [&](int64_t part, int64_t parts) { return part_begin(call.structure, part, parts); },
      [&](int64_t begin, int64_t end, Working<T>* scratch) { kernel(call, begin, end, scratch); });
}

template <class T>
void run_spmv(const MaskedProduct<T>& call, const uint16_t* narrow) {
  const auto kernel = TSCNC_SELECT(spmv_product<T>);
  run_in_parts<T>(
      call.structure, call.input.count,
      [&](int64_t part, int64_t parts) { return part_begin(call.structure, part, parts); },
      [&](int64_t begin, int64_t end, Working<T>* scratch) {
        kernel(call, narrow, begin, end, scratch);
      },
      narrow == nullptr ? 0 : kNarrowWidth);
}

// `transposed` only cuts the columns into parts of equal work.
template <class T>
void run_small_input_gradient(const MaskedInputGradient<T>& call, const SparseRows& transposed) {
  const auto kernel = TSCNC_SELECT(small_batch_input_gradient<T>);
  run_in_parts<T>(
      call.structure, call.gradient.count,
      [&](int64_t part, int64_t parts) { return part_begin(transposed, part, parts); },
      [&](int64_t begin, int64_t end, Working<T>* scratch) { kernel(call, begin, end, scratch); });
}

template <class T>
void run_small_weight_gradient(const MaskedWeightGradient<T>& call) {
  const auto kernel = TSCNC_SELECT(small_batch_weight_gradient<T>);
  run_in_parts<T>(
      call.structure, call.input.count,
      [&](int64_t part, int64_t parts) { return part_begin(call.structure, part, parts); },
      [&](int64_t begin, int64_t end, Working<T>* scratch) { kernel(call, begin, end, scratch); });
}

}  // namespace tscnc
