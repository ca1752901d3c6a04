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

// Whether the columns of the rows [begin, end) lie inside the structure, and those of one vector
// behind them, which a row's last vector may read. Reading the columns here costs little: they
// come from memory once and are used from the first-level cache.
inline bool columns_inside(const SparseRows& structure, int64_t begin, int64_t end) {
  const int64_t entries = structure.pointers[structure.rows];
  const int64_t last = smaller(structure.pointers[end] + kVectorBytes / 4, entries);
  const auto limit = static_cast<uint32_t>(structure.width - 1);
  uint32_t outside = 0;
  for (int64_t j = structure.pointers[begin]; j < last; ++j) {
    const auto column = static_cast<uint32_t>(structure.columns[j]);
    outside |= column | (limit - column);
  }
  return outside <= INT32_MAX;
}

// Loads of single elements beat the gather instruction on CPUs that split it into many more
// operations than it has lanes.
template <class C, int... kLane>
inline Vec<C> gather(const C* source, const int32_t* places, std::integer_sequence<int, kLane...>) {
  return Vec<C>{source[static_cast<uint32_t>(places[kLane])]...};
}

template <class C>
inline Vec<C> gather(const C* source, const int32_t* places) {
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
inline Vec<C> row_sums(const SparseRows& structure, const C* values, int64_t row, const C* x) {
  constexpr int kW = kLanes<C>;
  const int32_t* columns = structure.columns;
  const int64_t entries = structure.pointers[structure.rows], end = structure.pointers[row + 1];
  int64_t j = structure.pointers[row];
  Vec<C> even = {}, odd = {};
  for (; j + 2 * kW <= end; j += 2 * kW) {
    even += load(values + j) * gather(x, columns + j);
    odd += load(values + j + kW) * gather(x, columns + j + kW);
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

// The features of one sample, contiguous and in the arithmetic type.
template <class T>
inline const Compute<T>* contiguous_features(const Samples<T>& source, int64_t sample,
                                             int64_t begin, int64_t end, Compute<T>* scratch) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    if (source.saved == nullptr && source.feature_stride == 1) {
      return source.data + sample * source.sample_stride + begin;
    }
  }
  for (int64_t k = begin; k < end; k += kLanes<T>) {
    store(scratch + k - begin, load_features(source, sample, k, smaller(kLanes<T>, end - k)));
  }
  return scratch;
}

// Entries [row, row + count) of one sample's result.
template <class T>
inline void finish(const MaskedProduct<T>& call, Vec<Compute<T>> sum, int64_t sample, int64_t row,
                   int64_t count) {
  const auto put = [&](T* matrix, Vec<Compute<T>> value) {
    T* target = matrix + sample * call.structure.rows + row;
    count == kLanes<T> ? store(target, value) : store_partial(target, value, count);
  };
  if (call.bias != nullptr) sum += load_partial(call.bias + row, count);
  if (call.preactivation != nullptr) put(call.preactivation, sum);
  put(call.output, activate<Compute<T>>(sum, call.activation));
}

template <class T, int kVecs>
void product_tile(const MaskedProduct<T>& call, int64_t row, int64_t rows, int64_t sample,
                  int64_t count, const Compute<T>* panel, Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const int32_t* pointers = call.structure.pointers;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = pointers[row + r];
    Vec<C> sum[kVecs];
    row_product<C, kVecs>(call.values + begin, call.structure.columns + begin,
                          pointers[row + r + 1] - begin, panel, sum);
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

// values_gradient of the rows' entries for one sample; `first` tells that there is nothing to add
// to.
template <class C>
inline void row_outer(const int32_t* columns, int64_t count, C gradient, const C* x, bool first,
                      C* result) {
  constexpr int kW = kLanes<C>;
  int64_t j = 0;
  for (; j + kW <= count; j += kW) {
    const Vec<C> value = gradient * gather(x, columns + j);
    store(result + j, first ? value : load(result + j) + value);
  }
  for (; j < count; ++j) {
    const C value = gradient * x[columns[j]];
    result[j] = first ? value : result[j] + value;
  }
}

template <class T>
bool weight_gradient_of_one(const MaskedWeightGradient<T>& call, int64_t sample, int64_t begin,
                            int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  const int32_t* pointers = call.structure.pointers;
  const int64_t padded = (call.structure.width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const C* gradient = contiguous_features(call.gradient, sample, begin, end, scratch + padded);
  const C* x = nullptr;
  if (call.values_gradient != nullptr) {
    x = contiguous_features(call.input, sample, 0, call.structure.width, scratch);
  }
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t last = smaller(end, first + kTileRows);
    if (x != nullptr && sample == 0 && !columns_inside(call.structure, first, last)) return false;
    for (int64_t row = first; row < last; ++row) {
      const C held = gradient[row - begin];
      if (call.bias_gradient != nullptr) call.bias_gradient[row] += held;
      if (x == nullptr) continue;
      const int32_t start = pointers[row];
      row_outer<C>(call.structure.columns + start, pointers[row + 1] - start, held, x, sample == 0,
                   call.values_gradient + start);
    }
  }
  return true;
}

template <class T, int kVecs>
bool weight_gradient_of_group(const MaskedWeightGradient<T>& call, int64_t sample, int64_t count,
                              int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kWidth = kVecs * kLanes<T>;
  const int32_t* pointers = call.structure.pointers;
  Compute<T>* panel = scratch + kTileRows * kWidth;
  if (call.values_gradient != nullptr) {
    pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
  }
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t last = smaller(end, first + kTileRows);
    pack<T, kVecs>(call.gradient, sample, count, first, last, scratch);
    if (call.values_gradient != nullptr) {
      if (sample == 0 && !columns_inside(call.structure, first, last)) return false;
      if (sample == 0) {
        for (int64_t j = pointers[first]; j < pointers[last]; ++j) call.values_gradient[j] = 0;
      }
    }
    for (int64_t row = first; row < last; ++row) {
      const C* held = scratch + (row - first) * kWidth;
      if (call.values_gradient != nullptr) {
        const int32_t start = pointers[row];
        row_inner_products<C, kVecs>(held, call.structure.columns + start,
                                     pointers[row + 1] - start, panel,
                                     call.values_gradient + start);
      }
      if (call.bias_gradient == nullptr) continue;
      Vec<C> sum = load(held);
      for (int v = 1; v < kVecs; ++v) sum += load(held + v * kLanes<T>);
      call.bias_gradient[row] += sum_lanes<C>(sum);
    }
  }
  return true;
}

// The first of the entries [begin, end) in a column of at least `column`.
inline int64_t lower_entry(const int32_t* columns, int64_t begin, int64_t end, int64_t column) {
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

// Calls add(row, j) for the kept entries j in the columns [begin, end), row by row.
template <class Tile, class Add>
inline bool for_entries_of_columns(const SparseRows& structure, int64_t begin, int64_t end,
                                   const Tile& tile, const Add& add) {
  const bool all = begin == 0 && end == structure.width;
  for (int64_t first = 0; first < structure.rows; first += kTileRows) {
    const int64_t last = smaller(structure.rows, first + kTileRows);
    if (!columns_inside(structure, first, last)) return false;
    tile(first, last);
    for (int64_t row = first; row < last; ++row) {
      int64_t start = structure.pointers[row], stop = structure.pointers[row + 1];
      if (!all) {
        start = lower_entry(structure.columns, start, stop, begin);
        stop = lower_entry(structure.columns, start, stop, end);
      }
      add(row, start, stop);
    }
  }
  return true;
}

template <class T>
bool input_gradient_of_one(const MaskedInputGradient<T>& call, int64_t sample, int64_t begin,
                           int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  const SparseRows& structure = call.structure;
  const int64_t padded = (end - begin + kW - 1) / kW * kW;
  C* sums = scratch;
  for (int64_t k = 0; k < padded; k += kW) store(sums + k, Vec<C>{});
  const C* gradient =
      contiguous_features(call.gradient, sample, 0, structure.rows, scratch + padded);
  const bool inside = for_entries_of_columns(
      structure, begin, end, [](int64_t, int64_t) {},
      [&](int64_t row, int64_t start, int64_t stop) {
        const C held = gradient[row];
        C* target = sums - begin;
#pragma GCC unroll 4
        for (int64_t j = start; j < stop; ++j) {
          target[structure.columns[j]] += held * call.values[j];
        }
      });
  T* target = call.output + sample * structure.width + begin;
  for (int64_t k = 0; k < end - begin; k += kW) {
    store_partial(target + k, load(sums + k), smaller(kW, end - begin - k));
  }
  return inside;
}

template <class T, int kVecs>
bool input_gradient_of_group(const MaskedInputGradient<T>& call, int64_t sample, int64_t count,
                             int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const SparseRows& structure = call.structure;
  C* held = scratch;
  C* panel = scratch + kTileRows * kWidth;
  for (int64_t k = 0; k < (end - begin) * kWidth; k += kW) store(panel + k, Vec<C>{});
  int64_t first_row = 0;
  const bool inside = for_entries_of_columns(
      structure, begin, end,
      [&](int64_t first, int64_t last) {
        pack<T, kVecs>(call.gradient, sample, count, first, last, held);
        first_row = first;
      },
      [&](int64_t row, int64_t start, int64_t stop) {
        Vec<C> gradient[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          gradient[v] = load(held + (row - first_row) * kWidth + v * kW);
        }
        for (int64_t j = start; j < stop; ++j) {
          C* target = panel + (structure.columns[j] - begin) * kWidth;
          const Vec<C> value = broadcast(call.values[j]);
          for (int v = 0; v < kVecs; ++v) {
            store(target + v * kW, load(target + v * kW) + value * gradient[v]);
          }
        }
      });
  unpack<T, kVecs>(panel, end - begin, count, call.output + sample * structure.width + begin,
                   structure.width);
  return inside;
}

}  // namespace

template <class T>
int64_t small_batch_scratch(int64_t rows, int64_t width) {
  const int64_t vectors = rows + width + 2 * kLanes<T>;
  const int64_t panel = (width + kTileRows) * kGroup<T>;
  return vectors > panel ? vectors : panel;
}

template <class T>
bool spmv_product(const MaskedProduct<T>& call, int64_t begin, int64_t end, Working<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  for (int64_t sample = 0; sample < call.input.count; ++sample) {
    const C* x = contiguous_features(call.input, sample, 0, call.structure.width, scratch);
    for (int64_t row = begin; row < end; row += kW) {
      const int64_t rows = smaller(kW, end - row);
      if (sample == 0 && !columns_inside(call.structure, row, row + rows)) return false;
      Vec<C> part[kW] = {};
      for (int i = 0; i < rows; ++i) part[i] = row_sums<C>(call.structure, call.values, row + i, x);
      finish(call, sum_each<C>(part), sample, row, rows);
    }
  }
  return true;
}

template <class T>
bool small_batch_product(const MaskedProduct<T>& call, int64_t begin, int64_t end,
                         Working<T>* scratch) {
  bool inside = true;
  for (int64_t sample = 0; sample < call.input.count && inside; sample += kGroup<T>) {
    const int64_t count = smaller(kGroup<T>, call.input.count - sample);
    with_group_width<T>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      Compute<T>* panel = scratch + kTileRows * kVecs * kLanes<T>;
      pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      for (int64_t row = begin; row < end && inside; row += kTileRows) {
        const int64_t rows = smaller(kTileRows, end - row);
        inside = sample > 0 || columns_inside(call.structure, row, row + rows);
        if (inside) product_tile<T, kVecs>(call, row, rows, sample, count, panel, scratch);
      }
    });
  }
  return inside;
}

template <class T>
bool small_batch_input_gradient(const MaskedInputGradient<T>& call, int64_t begin, int64_t end,
                                Working<T>* scratch) {
  bool inside = true;
  if (call.gradient.count == 1) return input_gradient_of_one(call, 0, begin, end, scratch);
  for (int64_t sample = 0; sample < call.gradient.count && inside; sample += kGroup<T>) {
    const int64_t count = smaller(kGroup<T>, call.gradient.count - sample);
    with_group_width<T>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      inside = input_gradient_of_group<T, kVecs>(call, sample, count, begin, end, scratch);
    });
  }
  return inside;
}

template <class T>
bool small_batch_weight_gradient(const MaskedWeightGradient<T>& call, int64_t begin, int64_t end,
                                 Working<T>* scratch) {
  bool inside = true;
  if (call.input.count == 1) return weight_gradient_of_one(call, 0, begin, end, scratch);
  for (int64_t sample = 0; sample < call.input.count && inside; sample += kGroup<T>) {
    const int64_t count = smaller(kGroup<T>, call.input.count - sample);
    with_group_width<T>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      inside = weight_gradient_of_group<T, kVecs>(call, sample, count, begin, end, scratch);
    });
  }
  return inside;
}

#define TSCNC_INSTANTIATE(T)                                                                     \
  template int64_t small_batch_scratch<T>(int64_t, int64_t);                                     \
  template bool spmv_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);         \
  template bool small_batch_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);  \
  template bool small_batch_input_gradient<T>(const MaskedInputGradient<T>&, int64_t, int64_t,   \
                                              Working<T>*);                                      \
  template bool small_batch_weight_gradient<T>(const MaskedWeightGradient<T>&, int64_t, int64_t, \
                                               Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
