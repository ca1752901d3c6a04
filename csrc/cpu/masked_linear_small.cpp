#include "few_samples.h"

namespace tscnc::TSCNC_ISA {
namespace {

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
template <class C, class Places>
inline Vec<C> row_sums(const SparseRows& structure, Places columns, const C* values, int64_t row,
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

// Entries [row, row + count) of one sample's result.
template <class T>
inline void finish(const MaskedProduct<T>& call, Vec<Compute<T>> sum, int64_t sample, int64_t row,
                   int64_t count) {
  const auto put = [&](const Results<T>& matrix, Vec<Compute<T>> value) {
    T* target = matrix.data + sample * matrix.sample_stride + row * matrix.feature_stride;
    if (matrix.feature_stride == 1) {
      count == kLanes<T> ? store(target, value) : store_partial(target, value, count);
      return;
    }
    T buffer[kLanes<T>];
    store(buffer, value);
    for (int64_t i = 0; i < count; ++i) target[i * matrix.feature_stride] = buffer[i];
  };
  if (call.bias != nullptr) {
    sum += count == kLanes<T> ? load(call.bias + row) : load_partial(call.bias + row, count);
  }
  if (call.preactivation.data != nullptr) put(call.preactivation, sum);
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

}  // namespace

template <class T>
int64_t small_batch_scratch(int64_t rows, int64_t width) {
  const int64_t padded = padded_width(width);
  const int64_t vectors = rows + padded, panel = (padded + kSmallTileRows) * kGroup<T>;
  return vectors > panel ? vectors : panel;
}

template <class T>
void spmv_product(const MaskedProduct<T>& call, const uint16_t* narrow, int64_t begin, int64_t end,
                  Working<T>* scratch) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  const auto product = [&](auto columns, int64_t sample) {
    for (int64_t row = begin; row < end; row += kW) {
      const int64_t rows = smaller(kW, end - row);
      Vec<C> part[kW];
      for (int i = 0; i < kW; ++i) {
        part[i] =
            i < rows ? row_sums(call.structure, columns, call.values, row + i, scratch) : Vec<C>{};
      }
      finish(call, sum_each<C>(part), sample, row, rows);
    }
  };
  for (int64_t sample = 0; sample < call.input.count; ++sample) {
    copy_features(call.input, sample, 0, call.structure.width, scratch);
    if (narrow != nullptr) {
      product(NarrowColumns{narrow}, sample);
    } else {
      product(columns_of(call.structure), sample);
    }
  }
}

template <class T>
void small_batch_product(const MaskedProduct<T>& call, int64_t begin, int64_t end,
                         Working<T>* scratch) {
  for_groups<T>(call.input.count, [&](int64_t sample, int64_t count, auto width) {
    constexpr int kVecs = decltype(width)::value;
    Compute<T>* panel = scratch + kSmallTileRows * kVecs * kLanes<T>;
    pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
    for (int64_t row = begin; row < end; row += kSmallTileRows) {
      const int64_t rows = smaller(kSmallTileRows, end - row);
      product_tile<T, kVecs>(call, row, rows, sample, count, panel, scratch);
    }
  });
}

#define TSCNC_INSTANTIATE(T)                                                                \
  template int64_t small_batch_scratch<T>(int64_t, int64_t);                                \
  template void spmv_product<T>(const MaskedProduct<T>&, const uint16_t*, int64_t, int64_t, \
                                Working<T>*);                                               \
  template void small_batch_product<T>(const MaskedProduct<T>&, int64_t, int64_t, Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
