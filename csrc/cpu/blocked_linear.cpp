#include "blocked_linear.h"

#include <cstring>

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Eight sums hide the latency of a multiply-add without a second set; wider vectors have 32
// registers for two sets of four.
constexpr int kPanelVecs = kVectorBytes == 64 ? 4 : 8;
// Single inner products that wait for their reduction together.
constexpr int64_t kWaiting = 64;

// The values of a tile's rows, block by block: take(row, count) gives the row's next ones.
//
// In row-major order a block's values of neighbouring rows lie a row apart, where nothing
// prefetches them.
template <class C>
class RowMajorValues {
 public:
  RowMajorValues(C* values, const int32_t* starts, int64_t rows) : values_(values), rows_(rows) {
    std::memcpy(next_, starts, static_cast<size_t>(rows) * sizeof(int32_t));
  }

  C* take(int64_t row, uint8_t count) {
    constexpr int64_t kAhead = 8, kLine = 64 / static_cast<int64_t>(sizeof(C));
    const C* ahead = values_ + next_[row + kAhead < rows_ ? row + kAhead : row];
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + kLine);
    C* found = values_ + next_[row];
    next_[row] += count;
    return found;
  }

 private:
  C* values_;
  int64_t rows_;
  int32_t next_[kBlockedTileRows];
};

// The same in the order of the index.
template <class C>
class BlockOrderValues {
 public:
  explicit BlockOrderValues(C* first) : next_(first) {}

  C* take(int64_t, uint8_t count) {
    next_ += count;
    return next_ - count;
  }

 private:
  C* next_;
};

// Adds a block's part of the products to a tile of sums.
template <class C, int kVecs, class Values>
void add_block(const uint8_t* counts, int64_t rows, Values* values, const uint8_t* columns,
               const C* panel, C* tile) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  for (int64_t row = 0; row < rows; ++row, tile += kWidth) {
    const uint8_t count = counts[row];
    const C* taken = values->take(row, count);
    Vec<C> sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[v] = load(tile + v * kW);
    add_row_product<C, kVecs>(taken, columns, count, panel, sum);
    columns += count;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(tile + v * kW, sum[v]);
  }
}

template <class T, int kVecs>
void product_tile(const BlockedProduct<T>& call, int64_t tile, int64_t sample, int64_t count,
                  const Compute<T>* panel, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const BlockedRows& index = call.index;
  const int64_t row = tile * kBlockedTileRows, rows = index.tile_rows(tile);
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<C> bias =
        broadcast(call.bias == nullptr ? C(0) : load_partial(call.bias + row + r, 1)[0]);
    for (int v = 0; v < kVecs; ++v) store(sums + r * kWidth + v * kW, bias);
  }
  const auto add_blocks = [&](auto values) {
    for (int64_t block = 0; block < index.blocks(); ++block) {
      add_block<C, kVecs>(index.row_counts(tile, block), rows, &values,
                          index.columns + index.first_entry(tile, block),
                          panel + block * index.block_width * kWidth, sums);
    }
  };
  if (call.starts == nullptr) {
    add_blocks(BlockOrderValues<const C>(call.values + index.first_entry(tile, 0)));
  } else {
    add_blocks(RowMajorValues<const C>(call.values, call.starts + row, rows));
  }
  finish_tile<T, kVecs>(sums, row, rows, sample, count, call.activation, call.preactivation,
                        call.output);
}

// Inner products one by one: their lanes are summed kLanes products at a time.
template <class C>
class Waiting {
 public:
  void push(Vec<C> product, C* target) {
    store(products_ + count_ * kLanes<C>, product);
    targets_[count_++] = target;
    if (count_ == kWaiting) flush();
  }

  void flush() {
    constexpr int kW = kLanes<C>;
    for (int64_t first = 0; first < count_; first += kW) {
      Vec<C> rows[kW];
      for (int i = 0; i < kW; ++i) rows[i] = load(products_ + (first + i) * kW);
      C sums[kW];
      store(sums, sum_each<C>(rows));
      const int64_t left = count_ - first < kW ? count_ - first : kW;
      for (int64_t i = 0; i < left; ++i) *targets_[first + i] += sums[i];
    }
    count_ = 0;
  }

 private:
  alignas(64) C products_[kWaiting * kLanes<C>];
  C* targets_[kWaiting];
  int64_t count_ = 0;
};

// Adds <tile row, panel[column]> to the gradients of the entries of a block.
template <class C, int kVecs>
void add_block_gradients(const uint8_t* counts, int64_t rows, RowMajorValues<C>* values_gradient,
                         const uint8_t* columns, const C* panel, const C* tile,
                         Waiting<C>* waiting) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  for (int64_t row = 0; row < rows; ++row, tile += kWidth) {
    const uint8_t count = counts[row];
    Vec<C> held[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) held[v] = load(tile + v * kW);
    const auto product = [&](uint8_t column) {
      return lane_products<C, kVecs>(held, panel + static_cast<int64_t>(column) * kWidth);
    };
    C* gradients = values_gradient->take(row, count);
    int64_t j = 0;
    for (; j + kW <= count; j += kW) {
      store(gradients + j,
            load(gradients + j) + sum_each_of<C>([&](int i) { return product(columns[j + i]); }));
    }
    for (; j < count; ++j) waiting->push(product(columns[j]), gradients + j);
    columns += count;
  }
}

template <class T, int kVecs>
void weight_gradient_tile(const BlockedWeightGradient<T>& call, int64_t tile, int64_t sample,
                          int64_t count, const Compute<T>* panel, Compute<T>* held,
                          Waiting<Compute<T>>* waiting) {
  constexpr int kWidth = kVecs * kLanes<T>;
  const BlockedRows& index = call.index;
  const int64_t row = tile * kBlockedTileRows, rows = index.tile_rows(tile);
  pack<T, kVecs>(call.gradient, sample, count, row, row + rows, held);
  if (call.bias_gradient != nullptr) {
    add_row_sums<Compute<T>, kVecs>(held, rows, call.bias_gradient + row);
  }
  if (call.values_gradient == nullptr) return;
  RowMajorValues<Compute<T>> gradients(call.values_gradient, call.starts + row, rows);
  for (int64_t block = 0; block < index.blocks(); ++block) {
    add_block_gradients<Compute<T>, kVecs>(index.row_counts(tile, block), rows, &gradients,
                                           index.columns + index.first_entry(tile, block),
                                           panel + block * index.block_width * kWidth, held,
                                           waiting);
    waiting->flush();
  }
}

}  // namespace

template <class T>
int64_t blocked_lanes() {
  return kPanelVecs * kLanes<T>;
}

template <class T>
int64_t blocked_scratch(const BlockedRows& index) {
  return (index.panel_features() + kBlockedTileRows) * blocked_lanes<T>();
}

template <class T>
void blocked_product(const BlockedProduct<T>& call, int64_t begin, int64_t end,
                     Working<T>* scratch) {
  const int64_t lanes = blocked_lanes<T>(), tiles = call.index.tiles();
  Compute<T>* sums = scratch;
  Compute<T>* panel = scratch + kBlockedTileRows * lanes;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / call.tile_splits * lanes, split = item % call.tile_splits;
    const int64_t left = call.input.count - sample, count = left < lanes ? left : lanes;
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      if (packed != sample) {
        pack<T, kVecs>(call.input, sample, count, 0, call.index.width, panel);
      }
      for (int64_t tile = tiles * split / call.tile_splits;
           tile < tiles * (split + 1) / call.tile_splits; ++tile) {
        product_tile<T, kVecs>(call, tile, sample, count, panel, sums);
      }
    });
    packed = sample;
  }
}

template <class T>
void blocked_weight_gradient(const BlockedWeightGradient<T>& call, int64_t begin, int64_t end,
                             Working<T>* scratch) {
  const int64_t lanes = blocked_lanes<T>();
  Compute<T>* held = scratch;
  Compute<T>* panel = scratch + kBlockedTileRows * lanes;
  Waiting<Compute<T>> waiting;
  for (int64_t sample = 0; sample < call.input.count; sample += lanes) {
    const int64_t left = call.input.count - sample, count = left < lanes ? left : lanes;
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      if (call.values_gradient != nullptr) {
        pack<T, kVecs>(call.input, sample, count, 0, call.index.width, panel);
      }
      for (int64_t tile = begin; tile < end; ++tile) {
        weight_gradient_tile<T, kVecs>(call, tile, sample, count, panel, held, &waiting);
      }
    });
  }
}

#define TSCNC_INSTANTIATE(T)                                                                  \
  template int64_t blocked_lanes<T>();                                                        \
  template int64_t blocked_scratch<T>(const BlockedRows&);                                    \
  template void blocked_product<T>(const BlockedProduct<T>&, int64_t, int64_t, Working<T>*);  \
  template void blocked_weight_gradient<T>(const BlockedWeightGradient<T>&, int64_t, int64_t, \
                                           Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
