#include "few_samples.h"

namespace tscnc::TSCNC_ISA {
namespace {

// result[j] = gradient * x[columns[j]].
template <class C>
inline void row_outer(Columns columns, int64_t count, C gradient, const C* x, C* result) {
  constexpr int kW = kLanes<C>;
  int64_t j = 0;
  for (; j + kW <= count; j += kW) store(result + j, gradient * gather(x, columns + j));
  for (; j < count; ++j) result[j] = gradient * x[columns[j]];
}

// result[j] = <gradient, panel[columns[j]]> over the lanes, added to what is there if `add`.
template <class C, int kVecs>
inline void row_panel_outer(Columns columns, int64_t count, const C* gradient, const C* panel,
                            bool add, C* result) {
  constexpr int kW = kLanes<C>;
  Vec<C> held[kVecs];
  for (int v = 0; v < kVecs; ++v) held[v] = load(gradient + v * kW);
  const auto product = [&](int64_t j) {
    const C* row = panel + columns[j] * (kVecs * kW);
    Vec<C> sum = held[0] * load(row);
    for (int v = 1; v < kVecs; ++v) sum += held[v] * load(row + v * kW);
    return sum;
  };
  int64_t j = 0;
  for (; j + kW <= count; j += kW) {
    Vec<C> part[kW];
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) part[i] = product(j + i);
    const Vec<C> sum = sum_each<C>(part);
    store(result + j, add ? load(result + j) + sum : sum);
  }
  if (j == count) return;
  Vec<C> part[kW] = {};
  for (int i = 0; i < count - j; ++i) part[i] = product(j + i);
  Vec<C> sum = sum_each<C>(part);
  if (add) sum += load_partial(result + j, count - j);
  store_partial(result + j, sum, count - j);
}

template <class T>
void weight_gradient_of_one(const MaskedWeightGradient<T>& call, int64_t begin, int64_t end,
                            Compute<T>* scratch) {
  const SparseRows& structure = call.structure;
  const Columns columns = columns_of(structure);
  Compute<T>* gradient = scratch + padded_width(structure.width);
  copy_features(call.gradient, 0, begin, end, gradient);
  if (call.values_gradient != nullptr) copy_features(call.input, 0, 0, structure.width, scratch);
  for (int64_t row = begin; row < end; ++row) {
    if (call.bias_gradient != nullptr) call.bias_gradient[row] += gradient[row];
    if (call.values_gradient == nullptr) continue;
    const int32_t start = structure.pointers[row];
    row_outer<Compute<T>>(columns + start, structure.pointers[row + 1] - start, gradient[row],
                          scratch, call.values_gradient + start);
  }
}

template <class T, int kVecs>
void weight_gradient_of_group(const MaskedWeightGradient<T>& call, int64_t sample, int64_t count,
                              int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kWidth = kVecs * kLanes<T>;
  const SparseRows& structure = call.structure;
  const Columns columns = columns_of(structure);
  C* panel = scratch + kSmallTileRows * kWidth;
  if (call.values_gradient != nullptr) {
    pack<T, kVecs>(call.input, sample, count, 0, structure.width, panel);
  }
  for (int64_t first = begin; first < end; first += kSmallTileRows) {
    const int64_t last = smaller(end, first + kSmallTileRows);
    pack<T, kVecs>(call.gradient, sample, count, first, last, scratch);
    for (int64_t row = first; row < last; ++row) {
      const C* held = scratch + (row - first) * kWidth;
      if (call.values_gradient != nullptr) {
        const int32_t start = structure.pointers[row];
        row_panel_outer<C, kVecs>(columns + start, structure.pointers[row + 1] - start, held, panel,
                                  sample > 0, call.values_gradient + start);
      }
      if (call.bias_gradient == nullptr) continue;
      Vec<C> sum = load(held);
      for (int v = 1; v < kVecs; ++v) sum += load(held + v * kLanes<T>);
      call.bias_gradient[row] += sum_lanes<C>(sum);
    }
  }
}

// The first of the entries [begin, end) in a column of at least `column`.
inline int64_t lower_entry(Columns columns, int64_t begin, int64_t end, int64_t column) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

struct Range {
  int64_t begin, end;
};

// The kept entries of a row in the columns [begin, end).
inline Range entries_between(const SparseRows& structure, Columns columns, int64_t row,
                             int64_t begin, int64_t end) {
  Range range = {structure.pointers[row], structure.pointers[row + 1]};
  if (begin > 0) range.begin = lower_entry(columns, range.begin, range.end, begin);
  if (end < structure.width) range.end = lower_entry(columns, range.begin, range.end, end);
  return range;
}

// The features of one sample lie next to each other, whatever the layout.
template <class T>
void input_gradient_of_one(const MaskedInputGradient<T>& call, int64_t begin, int64_t end,
                           Compute<T>* scratch) {
  using C = Compute<T>;
  const SparseRows& structure = call.structure;
  const Columns columns = columns_of(structure);
  C* gradient = scratch + padded_width(structure.width);
  copy_features(call.gradient, 0, 0, structure.rows, gradient);
  for (int64_t k = begin; k < end; ++k) scratch[k] = 0;
  for (int64_t row = 0; row < structure.rows; ++row) {
    const Range range = entries_between(structure, columns, row, begin, end);
    const C held = gradient[row];
#pragma GCC unroll 4
    for (int64_t j = range.begin; j < range.end; ++j) scratch[columns[j]] += held * call.values[j];
  }
  for (int64_t k = begin; k < end; k += kLanes<T>) {
    const int64_t left = smaller(kLanes<T>, end - k);
    store_partial(call.output.data + k, load_partial(scratch + k, left), left);
  }
}

template <class T, int kVecs>
void input_gradient_of_group(const MaskedInputGradient<T>& call, int64_t sample, int64_t count,
                             int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const SparseRows& structure = call.structure;
  const Columns columns = columns_of(structure);
  C* panel = scratch + kSmallTileRows * kWidth;
  for (int64_t k = begin * kWidth; k < end * kWidth; k += kW) store(panel + k, Vec<C>{});
  for (int64_t row = 0; row < structure.rows; ++row) {
    const int64_t place = row % kSmallTileRows;
    if (place == 0) {
      const int64_t last = smaller(structure.rows, row + kSmallTileRows);
      pack<T, kVecs>(call.gradient, sample, count, row, last, scratch);
    }
    Vec<C> held[kVecs];
    for (int v = 0; v < kVecs; ++v) held[v] = load(scratch + place * kWidth + v * kW);
    const Range range = entries_between(structure, columns, row, begin, end);
#pragma GCC unroll 2
    for (int64_t j = range.begin; j < range.end; ++j) {
      C* target = panel + columns[j] * kWidth;
      const Vec<C> value = broadcast(call.values[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        store(target + v * kW, load(target + v * kW) + value * held[v]);
      }
    }
  }
  write_tile<T, kVecs>(panel + begin * kWidth, begin, end - begin, sample, count, call.output);
}

}  // namespace

template <class T>
void small_batch_input_gradient(const MaskedInputGradient<T>& call, int64_t begin, int64_t end,
                                Working<T>* scratch) {
  if (call.gradient.count == 1) return input_gradient_of_one(call, begin, end, scratch);
  for_groups<T>(call.gradient.count, [&](int64_t sample, int64_t count, auto width) {
    input_gradient_of_group<T, decltype(width)::value>(call, sample, count, begin, end, scratch);
  });
}

template <class T>
void small_batch_weight_gradient(const MaskedWeightGradient<T>& call, int64_t begin, int64_t end,
                                 Working<T>* scratch) {
  if (call.input.count == 1) return weight_gradient_of_one(call, begin, end, scratch);
  for_groups<T>(call.input.count, [&](int64_t sample, int64_t count, auto width) {
    weight_gradient_of_group<T, decltype(width)::value>(call, sample, count, begin, end, scratch);
  });
}

#define TSCNC_INSTANTIATE(T)                                                                     \
  template void small_batch_input_gradient<T>(const MaskedInputGradient<T>&, int64_t, int64_t,   \
                                              Working<T>*);                                      \
  template void small_batch_weight_gradient<T>(const MaskedWeightGradient<T>&, int64_t, int64_t, \
                                               Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
