#include "masked_linear_block.h"

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr int kPanelVecs = 4;
// Vectors of samples that a group is computed on at a time: with four rows, half of the registers.
constexpr int kGroupVecs = kVectorBytes == 64 ? 4 : 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Entries of a group's columns whose features stay in the first-level cache while every four rows
// of the group use them.
constexpr int64_t kBlockEntries = 192;

// tile[r * stride ..] += the products of kRows rows with kVecs vectors of a panel. The rows keep
// the same columns; those of a single row are summed in two sets, to hide the latency of a
// multiply-add.
template <class C, int kRows, int kVecs>
inline void add_group_product(const C* const* values, const int32_t* columns, int64_t begin,
                              int64_t end, const C* panel, int64_t stride, C* tile) {
  constexpr int kW = kLanes<C>, kSets = kRows == 1 ? 2 : 1;
  Vec<C> sum[kSets][kRows][kVecs] = {};
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) sum[0][r][v] = load(tile + r * stride + v * kW);
  }
  const auto add = [&](Vec<C>(*sums)[kVecs], int64_t j) {
    const C* feature = panel + columns[j] * stride;
    Vec<C> x[kVecs];
    for (int v = 0; v < kVecs; ++v) x[v] = load(feature + v * kW);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<C> value = broadcast(values[r][j]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] += value * x[v];
    }
  };
  int64_t j = begin;
  for (; j + 2 <= end; j += 2) {
    add(sum[0], j);
    add(sum[kSets - 1], j + 1);
  }
  if (j < end) add(sum[0], j);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec<C> total = kSets == 1 ? sum[0][r][v] : sum[0][r][v] + sum[kSets - 1][r][v];
      store(tile + r * stride + v * kW, total);
    }
  }
}

// tile = the products of a group of `rows` rows, a multiple of kRows.
template <class T, int kRows, int kVecs>
void group_product(const MaskedProduct<T>& call, int64_t row, int64_t rows, const Compute<T>* panel,
                   Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kStep = kRows == 1 || kVecs < kGroupVecs ? kVecs : kGroupVecs;
  constexpr int kWidth = kVecs * kLanes<T>;
  const int32_t* pointers = call.structure.pointers + row;
  const int32_t* columns = call.structure.columns + pointers[0];
  const int64_t count = pointers[1] - pointers[0];
  for (int64_t i = 0; i < rows * kWidth; i += kLanes<T>) store(tile + i, Vec<C>{});
  for (int64_t begin = 0; begin < count; begin += kBlockEntries) {
    const int64_t end = smaller(count, begin + kBlockEntries);
    for (int64_t r = 0; r < rows; r += kRows) {
      const C* values[kRows];
      for (int i = 0; i < kRows; ++i) values[i] = call.values + pointers[r + i];
      for (int v = 0; v < kVecs; v += kStep) {
        const int64_t lane = v * kLanes<T>;
        add_group_product<C, kRows, kStep>(values, columns, begin, end, panel + lane, kWidth,
                                           tile + r * kWidth + lane);
      }
    }
  }
}

// Adds the bias to a tile, and writes it with and without the activation.
template <class T, int kVecs>
void finish_groups(const MaskedProduct<T>& call, int64_t row, int64_t rows, int64_t sample,
                   int64_t count, Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  if (call.bias != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      const C bias = load_partial(call.bias + row + r, 1)[0];
      for (int64_t i = r * kWidth; i < (r + 1) * kWidth; i += kW) {
        store(tile + i, load(tile + i) + bias);
      }
    }
  }
  finish_tile<T, kVecs>(tile, row, rows, sample, count, call.activation, call.preactivation,
                        call.output);
}

template <class T, int kVecs>
void product_groups(const MaskedProduct<T>& call, const RowGroups& groups, int64_t begin,
                    int64_t end, int64_t sample, int64_t count, const Compute<T>* panel,
                    Compute<T>* tile) {
  constexpr int kWidth = kVecs * kLanes<T>;
  int64_t first = groups.starts[begin];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = groups.starts[group], next = groups.starts[group + 1];
    Compute<T>* target = tile + (row - first) * kWidth;
    if (next - row > 1) {
      group_product<T, kGroupRows, kVecs>(call, row, next - row, panel, target);
    } else {
      group_product<T, 1, kVecs>(call, row, 1, panel, target);
    }
    if (group + 1 < end && groups.starts[group + 2] - first <= kMaxGroupRows) continue;
    finish_groups<T, kVecs>(call, first, next - first, sample, count, tile);
    first = next;
  }
}

// The first kept entries' group among the groups when they are cut into `parts`.
inline int64_t group_split(const SparseRows& structure, const RowGroups& groups, int64_t part,
                           int64_t parts) {
  const int64_t row = part == parts ? structure.rows : row_split(structure, part, parts);
  int64_t low = 0, high = groups.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (groups.starts[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

template <class T>
int64_t block_lanes() {
  return kPanelVecs * kLanes<T>;
}

template <class T>
int64_t block_scratch(int64_t width) {
  return (width + kMaxGroupRows) * kPanelVecs * kLanes<T>;
}

template <class T>
void block_product(const MaskedProduct<T>& call, const RowGroups& groups, int64_t begin,
                   int64_t end, Working<T>* scratch) {
  const int64_t lanes = block_lanes<T>();
  Compute<T>* panel = scratch + kMaxGroupRows * lanes;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / call.row_splits * lanes, split = item % call.row_splits;
    const int64_t count = smaller(lanes, call.input.count - sample);
    const int64_t first = group_split(call.structure, groups, split, call.row_splits);
    const int64_t last = group_split(call.structure, groups, split + 1, call.row_splits);
    with_panel_width<T, kPanelVecs>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      if (packed != sample) {
        pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      }
      product_groups<T, kVecs>(call, groups, first, last, sample, count, panel, scratch);
    });
    packed = sample;
  }
}

#define TSCNC_INSTANTIATE(T)                                                                  \
  template int64_t block_lanes<T>();                                                          \
  template int64_t block_scratch<T>(int64_t);                                                 \
  template void block_product<T>(const MaskedProduct<T>&, const RowGroups&, int64_t, int64_t, \
                                 Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
