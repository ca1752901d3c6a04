// masked_linear for few samples: the products of up to 16 samples at once, and of one after
// another.
#include <algorithm>

#include "cpu/masked_linear_small.h"
#include "dtype_dispatch.h"
#include "masked_linear_rows.h"
#include "scratch.h"

namespace tscnc {
namespace {

using torch::stable::Tensor;

// Runs kernel(begin, end, scratch) on the ranges that split(part, parts) cuts.
template <class T, class Split, class Kernel>
void run_in_parts(const SparseRows& structure, int64_t samples, const Split& split,
                  const Kernel& kernel) {
  constexpr int64_t kWorkOfThread = 1 << 17;
  const int64_t work = structure.pointers[structure.rows] * samples;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kWorkOfThread, 1, threads);
  const int64_t size = TSCNC_SELECT(small_batch_scratch<T>)(structure.rows, structure.width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = split(first, parts), end = split(last, parts);
    if (begin < end) kernel(begin, end, thread_scratch().reserve<Working<T>>(size));
  });
}

// The first of `rows` rows of part `part`; the last part ends behind trailing empty rows.
int64_t part_begin(const SparseRows& structure, int64_t part, int64_t parts) {
  return part == parts ? structure.rows : row_split(structure, part, parts);
}

template <class T>
void run_small_product(const MaskedProduct<T>& call, bool one_by_one) {
  const auto kernel =
      one_by_one ? TSCNC_SELECT(spmv_product<T>) : TSCNC_SELECT(small_batch_product<T>);
  run_in_parts<T>(
      call.structure, call.input.count,
      [&](int64_t part, int64_t parts) { return part_begin(call.structure, part, parts); },
      [&](int64_t begin, int64_t end, Working<T>* scratch) { kernel(call, begin, end, scratch); });
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

// The kernels keep their reads inside by themselves; a dense weight is read by the columns.
SparseRows small_rows(const Tensor& pointers, const Tensor& columns, int64_t width,
                      const Tensor& weight) {
  return sparse_rows(pointers, columns, width, "row_pointers", "columns", weight.dim() == 2);
}

void small_forward(const LinearForward& call, bool one_by_one) {
  const SparseRows structure =
      small_rows(call.row_pointers, call.columns, call.input.size(1), call.weight);
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = row_values<T>(call.weight, structure);
    run_small_product<T>(forward_product<T>(call, structure, values), one_by_one);
  });
}

}  // namespace

void small_batch_forward(const LinearForward& call) { small_forward(call, false); }

void spmv_forward(const LinearForward& call) { small_forward(call, true); }

void small_batch_input_gradient(const LinearInputGradient& call) {
  const Tensor &columns = call.column_rows, &row_pointers = call.permutation;
  const int64_t width = call.result.size(1);
  const SparseRows structure = small_rows(row_pointers, columns, width, call.weight);
  const SparseRows transposed{
      pointer_data(kMaskedLinear, call.column_pointers, columns.numel(), "column_pointers"),
      nullptr, width, structure.rows};
  STD_TORCH_CHECK(structure.rows == call.gradient.size(1), kMaskedLinear, ": expected ",
                  call.gradient.size(1), " rows, got ", structure.rows);
  dispatch_floating(kMaskedLinear, call.gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor values = row_values<T>(call.weight, structure);
    run_small_input_gradient<T>(
        {structure, data<Working<T>>(values),
         samples<T>(call.gradient, call.saved, call.activation), mutable_data<T>(call.result)},
        transposed);
  });
}

std::tuple<Tensor, Tensor> small_batch_weight_gradient(const LinearWeightGradient& call) {
  const SparseRows structure =
      small_rows(call.row_pointers, call.columns, call.input.size(1), call.weight);
  std::tuple<Tensor, Tensor> result{call.weight, call.weight};
  dispatch_floating(kMaskedLinear, call.input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool overwrites = call.input.size(0) > 0;
    result = weight_gradient<T>(call, structure, overwrites, run_small_weight_gradient<T>);
  });
  return result;
}

}  // namespace tscnc
