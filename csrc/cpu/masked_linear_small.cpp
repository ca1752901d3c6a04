#include "masked_linear_small.h"

#include <utility>

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Rows that are finished together: whole cache lines of a row-major output.
constexpr int64_t kTileRows = 16;
// Up to 16 samples in at most four vectors.
template <class T>
constexpr int kGroupVecs = 16 / kLanes<T> < 4 ? 16 / kLanes<T> : 4;
template <class T>
constexpr int64_t kGroup = kGroupVecs<T> * kLanes<T>;

// The narrowest group for `count` samples.
template <class T, class Function>
inline void with_group_width(int64_t count, const Function& function) {
  if (kGroupVecs<T> == 1 || count <= kLanes<T>) {
    function(std::integral_constant<int, 1>());
  } else if (kGroupVecs<T> == 2 || count <= 2 * kLanes<T>) {
    function(std::integral_constant < int, kGroupVecs<T><2 ? kGroupVecs<T> : 2>());
  } else {
    function(std::integral_constant<int, kGroupVecs<T>>());
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Entries that are fetched ahead: the hardware alone does not keep up with two streams from memory.
constexpr int64_t kAhead = 512;

template <class C>
inline void fetch_ahead(const C* values, const int32_t* columns) {
  __builtin_prefetch(values + kAhead);
  __builtin_prefetch(columns + kAhead);
}

// A vector of a panel or of a sample has this many entries, a power of two, so that a mask keeps
// every column inside, whatever the index holds. Looking at the index before using it would read it
// twice, which costs a third of the time of a product with one sample.
inline int64_t padded_width(int64_t width) {
  int64_t padded = 1;
  while (padded < width) padded *= 2;
  return padded;
}

// Columns of a matrix whose padded width is mask + 1.
struct Columns {
  const int32_t* data;
  uint32_t mask;

  int64_t operator[](int64_t j) const { return static_cast<uint32_t>(data[j]) & mask; }
  Columns operator+(int64_t offset) const { return {data + offset, mask}; }
};

inline Columns columns_of(const SparseRows& structure) {
  return {structure.columns, static_cast<uint32_t>(padded_width(structure.width) - 1)};
}

// Loads of single elements beat the gather instruction on CPUs that split it into many more
// operations than it has lanes.
template <class C, int... kLane>
inline Vec<C> gather(const C* source, Columns places, std::integer_sequence<int, kLane...>) {
  return Vec<C>{source[places[kLane]]...};
}

template <class C>
inline Vec<C> gather(const C* source, Columns places) {
  return gather<C>(source, places, std::make_integer_sequence<int, kLanes<C>>());
}

template <class C, int... kLane>
inline Vec<C> lane_numbers(std::integer_sequence<int, kLane...>) {
  return Vec<C>{static_cast<C>(kLane)...};
}

// The first `count` lanes of `value`, zeros behind them.
template <class C>
inline Vec<C> first_lanes(Vec<C> value, int64_t count) {
  const Vec<C> lanes = lane_numbers<C>(std::make_integer_sequence<int, kLanes<C>>());
  return lanes < static_cast<C>(count) ? value : Vec<C>{};
}

// A vector whose lanes sum up to the product of row `row` with x.
template <class C>
inline Vec<C> row_sums(const SparseRows& structure, Columns columns, const C* values, int64_t row,
                       const C* x) {
  constexpr int kW = kLanes<C>;
  const int64_t entries = structure.pointers[structure.rows], end = structure.pointers[row + 1];
  int64_t j = structure.pointers[row];
  Vec<C> even = {}, odd = {};
  for (; j + 2 * kW <= end; j += 2 * kW) {
    fetch_ahead(values + j, columns.data + j);
    even += load(values + j) * gather(x, columns + j);
    odd += load(values + j + kW) * gather(x, columns + (j + kW));
  }
  if (j + kW <= end) {
    even += load(values + j) * gather(x, columns + j);
    j += kW;
  }
  if (j == end) return even + odd;
  if (j + kW <= entries) {
    return even + odd + first_lanes<C>(load(values + j) * gather(x, columns + j), end - j);
  }
  C last[kW] = {};
  for (int i = 0; i < end - j; ++i) last[i] = values[j + i] * x[columns[j + i]];
  return even + odd + load(last);
}

// sum[v] = sum over j of values[j] * panel[columns[j]].
template <class C, int kVecs>
inline void row_panel_product(Columns columns, const C* values, int64_t count, const C* panel,
                              Vec<C>* sum) {
  constexpr int kW = kLanes<C>, kUnroll = 4;
  Vec<C> part[kUnroll][kVecs] = {};
  const auto add = [&](Vec<C>* sums, int64_t j) {
    const Vec<C> value = broadcast(values[j]);
    const C* row = panel + columns[j] * (kVecs * kW);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[v] += value * load(row + v * kW);
  };
  int64_t j = 0;
  for (; j + kUnroll <= count; j += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) add(part[u], j + u);
  }
  for (; j < count; ++j) add(part[0], j);
  for (int v = 0; v < kVecs; ++v) {
    sum[v] = (part[0][v] + part[1][v]) + (part[2][v] + part[3][v]);
  }
}

// The features [begin, end) of one sample in the arithmetic type, at target[begin .. end).
template <class T>
inline void copy_features(const Samples<T>& source, int64_t sample, int64_t begin, int64_t end,
                          Compute<T>* target) {
  int64_t k = begin;
  for (; k + kLanes<T> <= end; k += kLanes<T>) {
    store(target + k, load_features(source, sample, k, kLanes<T>));
  }
  if (k < end) store_partial(target + k, load_features(source, sample, k, end - k), end - k);
}

// Entries [row, row + count) of one sample's result.
template <class T>
inline void finish(const MaskedProduct<T>& call, Vec<Compute<T>> sum, int64_t sample, int64_t row,
                   int64_t count) {
  const auto put = [&](T* matrix, Vec<Compute<T>> value) {
    T* target = matrix + sample * call.structure.rows + row;
    count == kLanes<T> ? store(target, value) : store_partial(target, value, count);
  };
  if (call.bias != nullptr) {
    sum += count == kLanes<T> ? load(call.bias + row) : load_partial(call.bias + row, count);
  }
  if (call.preactivation != nullptr) put(call.preactivation, sum);
  put(call.output, activate<Compute<T>>(sum, call.activation));
}

template <class T, int kVecs>
void product_tile(const MaskedProduct<T>& call, int64_t row, int64_t rows, int64_t sample,
                  int64_t count, const Compute<T>* panel, Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const int32_t* pointers = call.structure.pointers;
  const Columns columns = columns_of(call.structure);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = pointers[row + r];
    Vec<C> sum[kVecs];
    row_panel_product<C, kVecs>(columns + begin, call.values + begin, pointers[row + r + 1] - begin,
                                panel, sum);
    for (int v = 0; v < kVecs; ++v) store(tile + r * kWidth + v * kW, sum[v]);
  }
  for (int64_t lane = 0; lane < count; lane += kW) {
    for (int64_t r = 0; r < rows; r += kW) {
      Vec<C> block[kW] = {};
      const int64_t left = smaller(kW, rows - r), present = smaller(kW, count - lane);
      for (int i = 0; i < left; ++i) block[i] = load(tile + (r + i) * kWidth + lane);
      transpose<C>(block);
      for (int i = 0; i < present; ++i) finish(call, block[i], sample + lane + i, row + r, left);
    }
  }
}

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
  C* panel = scratch + kTileRows * kWidth;
  if (call.values_gradient != nullptr) {
    pack<T, kVecs>(call.input, sample, count, 0, structure.width, panel);
  }
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t last = smaller(end, first + kTileRows);
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
    store_partial(call.output + k, load_partial(scratch + k, left), left);
  }
}

template <class T, int kVecs>
void input_gradient_of_group(const MaskedInputGradient<T>& call, int64_t sample, int64_t count,
                             int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const SparseRows& structure = call.structure;
  const Columns columns = columns_of(structure);
  C* panel = scratch + kTileRows * kWidth;
  for (int64_t k = begin * kWidth; k < end * kWidth; k += kW) store(panel + k, Vec<C>{});
  for (int64_t row = 0; row < structure.rows; ++row) {
    const int64_t place = row % kTileRows;
    if (place == 0) {
      const int64_t last = smaller(structure.rows, row + kTileRows);
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
  unpack<T, kVecs>(panel + begin * kWidth, end - begin, count,
                   call.output + sample * structure.width + begin, structure.width);
}

// Calls function(sample, count, width) for every group of samples.
template <class T, class Function>
inline void for_groups(int64_t samples, const Function& function) {
  for (int64_t sample = 0; sample < samples; sample += kGroup<T>) {
    const int64_t count = smaller(kGroup<T>, samples - sample);
    with_group_width<T>(count, [&](auto width) { function(sample, count, width); });
  }
}

}  // namespace

template <class T>
int64_t small_batch_scratch(int64_t rows, int64_t width) {
  const int64_t padded = padded_width(width);
  const int64_t vectors = rows + padded, panel = (padded + kTileRows) * kGroup<T>;
  return vectors > panel ? vectors : panel;
}

template <class T>
void spmv_product(const MaskedProduct<T>& call, int64_t begin, int64_t end, Working<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  const Columns columns = columns_of(call.structure);
  for (int64_t sample = 0; sample < call.input.count; ++sample) {
    copy_features(call.input, sample, 0, call.structure.width, scratch);
    for (int64_t row = begin; row < end; row += kW) {
      const int64_t rows = smaller(kW, end - row);
      Vec<C> part[kW];
      for (int i = 0; i < kW; ++i) {
        part[i] =
            i < rows ? row_sums(call.structure, columns, call.values, row + i, scratch) : Vec<C>{};
      }
      finish(call, sum_each<C>(part), sample, row, rows);
    }
  }
}

template <class T>
void small_batch_product(const MaskedProduct<T>& call, int64_t begin, int64_t end,
                         Working<T>* scratch) {
  for_groups<T>(call.input.count, [&](int64_t sample, int64_t count, auto width) {
    constexpr int kVecs = decltype(width)::value;
    Compute<T>* panel = scratch + kTileRows * kVecs * kLanes<T>;
    pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t rows = smaller(kTileRows, end - row);
      product_tile<T, kVecs>(call, row, rows, sample, count, panel, scratch);
    }
  });
}

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
  template int64_t small_batch_scratch<T>(int64_t, int64_t);                                     \
  template void spmv_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);         \
  template void small_batch_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);  \
  template void small_batch_input_gradient<T>(const MaskedInputGradient<T>&, int64_t, int64_t,   \
                                              Working<T>*);                                      \
  template void small_batch_weight_gradient<T>(const MaskedWeightGradient<T>&, int64_t, int64_t, \
                                               Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
