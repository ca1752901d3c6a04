#include "masked_linear_backward.h"

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// With as many vectors held and as many sums, a panel this wide fills AVX2's registers.
constexpr int kPanelVecs = 4;
// Rows of the transposed structure whose inputs and results share the first-level cache.
constexpr int64_t kTileRows = 64;
// Products whose lanes are summed together.
constexpr int64_t kPending = 64;
// How many entries ahead the panel's lines are fetched from the second-level cache.
constexpr int64_t kAhead = 8;

// Products of consecutive entries whose lanes are still to be summed, kLanes of them at a time and
// across the borders of rows, most of which are short.
template <class C>
class Pending {
 public:
  Pending(C* products, C* result) : products_(products), result_(result) {}

  int64_t room() const { return kPending - count_; }
  C* next() const { return products_ + count_ * kLanes<C>; }

  void advance(int64_t count) {
    count_ += count;
    if (count_ < kPending) return;
    for (int64_t i = 0; i < kPending; i += kLanes<C>) {
      store(result_ + i, load(result_ + i) + sums(i));
    }
    result_ += kPending;
    count_ = 0;
  }

  void finish() {
    for (int64_t i = 0; i < count_; i += kLanes<C>) {
      const int64_t left = count_ - i < kLanes<C> ? count_ - i : kLanes<C>;
      C found[kLanes<C>];
      store(found, sums(i));
      for (int64_t j = 0; j < left; ++j) result_[i + j] += found[j];
    }
    count_ = 0;
  }

 private:
  Vec<C> sums(int64_t first) const {
    return sum_each_of<C>([&](int i) { return load(products_ + (first + i) * kLanes<C>); });
  }

  C* products_;
  C* result_;
  int64_t count_ = 0;
};

template <class C, int kVecs>
inline void fetch_row(const C* panel, int32_t column) {
  constexpr int kWidth = kVecs * kLanes<C>;
  fetch_ahead<C, kWidth>(panel + static_cast<int64_t>(column) * kWidth);
}

// sum += values[j] * panel[columns[j]] and products[j] = held * panel[columns[j]] for `count`
// entries; `last` is the place of the last entry whose column may be read.
template <class C, int kVecs>
inline void both_products(const C* values, const int32_t* columns, int64_t count, int64_t last,
                          const C* panel, const Vec<C>* held, Vec<C>* sum, C* products) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  for (int64_t j = 0; j < count; ++j) {
    fetch_row<C, kVecs>(panel, columns[j + kAhead < last ? j + kAhead : last]);
    const C* row = panel + static_cast<int64_t>(columns[j]) * kWidth;
    const Vec<C> value = broadcast(values[j]);
    Vec<C> part[2] = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec<C> lanes = load(row + v * kW);
      sum[v] += value * lanes;
      part[v % 2] += held[v] * lanes;
    }
    store(products + j * kW, kVecs == 1 ? part[0] : part[0] + part[1]);
  }
}

// The rows [first, end) of a tile: their inputs lie in `inputs`, their results go to `tile`.
template <class T, int kVecs>
void backward_tile(const MaskedBackward<T>& call, int64_t first, int64_t end, int64_t last,
                   const Compute<T>* panel, const Compute<T>* inputs, Compute<T>* tile,
                   Pending<Compute<T>>* pending) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const int32_t* pointers = call.transposed.pointers;
  for (int64_t row = first; row < end; ++row, inputs += kWidth, tile += kWidth) {
    Vec<C> held[kVecs], sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      held[v] = load(inputs + v * kW);
      sum[v] = Vec<C>{};
    }
    for (int64_t j = pointers[row]; j < pointers[row + 1];) {
      const int64_t left = pointers[row + 1] - j, room = pending->room();
      const int64_t count = left < room ? left : room;
      both_products<C, kVecs>(call.values + j, call.transposed.columns + j, count, last - j, panel,
                              held, sum, pending->next());
      pending->advance(count);
      j += count;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(tile + v * kW, sum[v]);
  }
}

}  // namespace

template <class T>
int64_t masked_linear_backward_scratch(int64_t width) {
  return (width + 2 * kTileRows) * kPanelVecs * kLanes<T> + kPending * kLanes<T>;
}

template <class T>
void masked_linear_backward(const MaskedBackward<T>& call, int64_t begin, int64_t end,
                            int64_t bias_begin, int64_t bias_end, Working<T>* scratch) {
  using C = Compute<T>;
  constexpr int64_t kLanesOfPanel = kPanelVecs * kLanes<T>;
  const SparseRows& structure = call.transposed;
  C* inputs = scratch;
  C* tile = inputs + kTileRows * kLanesOfPanel;
  C* products = tile + kTileRows * kLanesOfPanel;
  C* panel = products + kPending * kLanes<T>;
  const int64_t start = structure.pointers[begin], last = structure.pointers[end] - 1;
  for (int64_t sample = 0; sample < call.input.count; sample += kLanesOfPanel) {
    const int64_t left = call.input.count - sample;
    const int64_t count = left < kLanesOfPanel ? left : kLanesOfPanel;
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value, kWidth = kVecs * kLanes<T>;
      pack<T, kVecs>(call.gradient, sample, count, 0, structure.width, panel);
      if (call.bias_gradient != nullptr) {
        add_row_sums<C, kVecs>(panel + bias_begin * kWidth, bias_end - bias_begin,
                               call.bias_gradient + bias_begin);
      }
      Pending<C> pending(products, call.values_gradient + start);
      for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
        pack<T, kVecs>(call.input, sample, count, row, row + rows, inputs);
        backward_tile<T, kVecs>(call, row, row + rows, last, panel, inputs, tile, &pending);
        write_tile<T, kVecs>(tile, row, rows, sample, count, call.input_gradient);
      }
      pending.finish();
    });
  }
}

#define TSCNC_INSTANTIATE(T)                                                                   \
  template int64_t masked_linear_backward_scratch<T>(int64_t);                                 \
  template void masked_linear_backward<T>(const MaskedBackward<T>&, int64_t, int64_t, int64_t, \
                                          int64_t, Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
