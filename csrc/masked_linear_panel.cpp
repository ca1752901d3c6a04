// masked_linear by panels of samples that meet whole rows of the weight.
#include <algorithm>

#include "dtype_dispatch.h"
#include "masked_linear_rows.h"
#include "scratch.h"

namespace tscnc {
namespace {

using torch::stable::Tensor;

// One parallel region: panels of samples, and also ranges of rows where there are fewer panels than
// threads.
template <class T>
void run_product(MaskedProduct<T> call) {
  if (call.input.count == 0) return;
  const int64_t lanes = TSCNC_SELECT(masked_linear_lanes<T>)();
  const int64_t panels = (call.input.count + lanes - 1) / lanes;
  const int64_t threads = torch::stable::get_num_threads();
  call.row_splits = panels < threads ? (threads + panels - 1) / panels : 1;
  const int64_t work =
      (call.structure.pointers[call.structure.rows] + call.structure.width + call.structure.rows) *
      lanes / call.row_splits;
  const auto kernel = TSCNC_SELECT(masked_linear_product<T>);
  const int64_t size = TSCNC_SELECT(masked_linear_scratch<T>)(call.structure.width);
  torch::stable::parallel_for(0, panels * call.row_splits,
                              std::max<int64_t>(1, kParallelWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                auto* scratch = thread_scratch().reserve<Working<T>>(size);
                                kernel(call, begin, end, scratch);
                              });
}

// Ranges of rows with about equal numbers of kept entries; each sums over the batch in order.
template <class T>
void run_weight_gradient(const MaskedWeightGradient<T>& call) {
  const SparseRows& structure = call.structure;
  const int64_t work = structure.pointers[structure.rows] * call.input.count;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kParallelWork, 1, threads);
  const auto kernel = TSCNC_SELECT(masked_linear_weight_gradient<T>);
  const int64_t size = TSCNC_SELECT(masked_linear_scratch<T>)(structure.width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row_split(structure, begin, parts);
    const int64_t last = end == parts ? structure.rows : row_split(structure, end, parts);
    if (first < last) kernel(call, first, last, thread_scratch().reserve<Working<T>>(size));
  });
}

}  // namespace

void panel_forward(const LinearForward& call) {
  const SparseRows structure =
      sparse_rows(call.row_pointers, call.columns, call.input.size(1), "row_pointers", "columns");
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = row_values<T>(call.weight, structure);
    run_product<T>(forward_product<T>(call, structure, values));
  });
}

void panel_input_gradient(const LinearInputGradient& call) {
  const int64_t rows = call.gradient.size(1), kept = call.column_rows.numel();
  const SparseRows structure =
      sparse_rows(call.column_pointers, call.column_rows, rows, "column_pointers", "column_rows");
  const int32_t* order = bounded_index(kMaskedLinear, call.permutation, kept, kept, "permutation");
  dispatch_floating(kMaskedLinear, call.gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = column_values<T>(call.weight, structure, order);
    run_product<T>(input_gradient_product<T>(call, structure, values));
  });
}

std::tuple<Tensor, Tensor> panel_weight_gradient(const LinearWeightGradient& call) {
  const SparseRows structure =
      sparse_rows(call.row_pointers, call.columns, call.input.size(1), "row_pointers", "columns");
  std::tuple<Tensor, Tensor> result{call.weight, call.weight};
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    result = weight_gradient<T>(call, structure, false, run_weight_gradient<T>);
  });
  return result;
}

}  // namespace tscnc
