#include "masked_linear_block.h"

#include "panel.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr int kPanelVecs = 4;
// Vectors of samples that a group is computed on at a time: with four rows, half of the registers.
constexpr int kGroupVecs = kVectorBytes == 64 ? 4 : 2;
// Rows that are finished together: whole cache lines of a row-major output.
constexpr int64_t kTileRows = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The narrowest panel for `count` samples.
template <class T, class Function>
inline void with_panel_width(int64_t count, const Function& function) {
  if (count <= kLanes<T>) {
    function(std::integral_constant<int, 1>());
  } else if (count <= 2 * kLanes<T>) {
    function(std::integral_constant<int, 2>());
  } else {
    function(std::integral_constant<int, kPanelVecs>());
  }
}

// tile[r * stride ..] = the products of kRows rows with kVecs vectors of a panel. The rows keep the
// same columns; those of a single row are summed in two sets, to hide the latency of a
// multiply-add.
template <class C, int kRows, int kVecs>
inline void group_product(const C* const* values, const int32_t* columns, int64_t count,
                          const C* panel, int64_t stride, C* tile) {
  constexpr int kW = kLanes<C>, kSets = kRows == 1 ? 2 : 1;
  Vec<C> sum[kSets][kRows][kVecs] = {};
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
  int64_t j = 0;
  for (; j + kSets <= count; j += kSets) {
#pragma GCC unroll 2
    for (int s = 0; s < kSets; ++s) add(sum[s], j + s);
  }
  if (j < count) add(sum[0], j);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec<C> total = kSets == 1 ? sum[0][r][v] : sum[0][r][v] + sum[kSets - 1][r][v];
      store(tile + r * stride + v * kW, total);
    }
  }
}

template <class T, int kRows, int kVecs>
void group_rows(const MaskedProduct<T>& call, int64_t row, const Compute<T>* panel,
                Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kStep = kRows == 1 || kVecs < kGroupVecs ? kVecs : kGroupVecs;
  constexpr int kWidth = kVecs * kLanes<T>;
  const int32_t* pointers = call.structure.pointers + row;
  const C* values[kRows];
  for (int r = 0; r < kRows; ++r) values[r] = call.values + pointers[r];
  for (int v = 0; v < kVecs; v += kStep) {
    const int64_t lane = v * kLanes<T>;
    group_product<C, kRows, kStep>(values, call.structure.columns + pointers[0],
                                   pointers[1] - pointers[0], panel + lane, kWidth, tile + lane);
  }
}

// Adds the bias to a tile, and writes it with and without the activation.
template <class T, int kVecs>
void finish_tile(const MaskedProduct<T>& call, int64_t row, int64_t rows, int64_t sample,
                 int64_t count, Compute<T>* tile) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  const int64_t stride = call.structure.rows, offset = sample * stride + row;
  if (call.bias != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      const C bias = load_partial(call.bias + row + r, 1)[0];
      for (int64_t i = r * kWidth; i < (r + 1) * kWidth; i += kW) {
        store(tile + i, load(tile + i) + bias);
      }
    }
  }
  if (call.preactivation != nullptr) {
    unpack<T, kVecs>(tile, rows, count, call.preactivation + offset, stride);
  }
  if (call.activation != Activation::none) {
    for (int64_t i = 0; i < rows * kWidth; i += kW) {
      store(tile + i, activate<C>(load(tile + i), call.activation));
    }
  }
  unpack<T, kVecs>(tile, rows, count, call.output + offset, stride);
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
    if (next - row == kGroupRows) {
      group_rows<T, kGroupRows, kVecs>(call, row, panel, target);
    } else {
      group_rows<T, 1, kVecs>(call, row, panel, target);
    }
    if (group + 1 < end && groups.starts[group + 2] - first <= kTileRows) continue;
    finish_tile<T, kVecs>(call, first, next - first, sample, count, tile);
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

// One vector for the weight gradient of a group holds `kSamples` samples of each of its rows.
template <class C>
constexpr int kSamples = kLanes<C> / static_cast<int>(kGroupRows);

// The next kSamples samples of a feature, repeated over the vector.
template <class C>
inline Vec<C> repeated(const C* samples) {
  if constexpr (kSamples<C> == 1) {
    return broadcast(*samples);
  } else if constexpr (kSamples<C> == 2 && sizeof(C) == 4) {
    double pair;
    std::memcpy(&pair, samples, sizeof(pair));
    const Vec<double> pairs = broadcast(pair);
    Vec<C> result;
    std::memcpy(&result, &pairs, sizeof(result));
    return result;
  } else {
    Vec<C> result;
    for (int i = 0; i < kLanes<C>; i += kSamples<C>) {
      for (int s = 0; s < kSamples<C>; ++s) result[i + s] = samples[s];
    }
    return result;
  }
}

// From kLanes vectors, one per entry, whose lanes are (row, sample): four vectors, one per row,
// whose lanes are the entries' sums over the samples.
template <class C, int kHalf = 1, int kCount = kLanes<C>>
inline void sum_samples(Vec<C>* sums) {
  if constexpr (kHalf < kSamples<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      sums[i] = join_halves<C, kHalf, 0>(sums[2 * i], sums[2 * i + 1]) +
                join_halves<C, kHalf, 1>(sums[2 * i], sums[2 * i + 1]);
    }
    sum_samples<C, 2 * kHalf, kCount / 2>(sums);
  } else if constexpr (kHalf < kLanes<C>) {
    constexpr int kStep = kHalf / kSamples<C>;
#pragma GCC unroll 4
    for (int i = 0; i < static_cast<int>(kGroupRows); ++i) {
      if (i & kStep) continue;
      const Vec<C> low = join_halves<C, kHalf, 0>(sums[i], sums[i + kStep]);
      sums[i + kStep] = join_halves<C, kHalf, 1>(sums[i], sums[i + kStep]);
      sums[i] = low;
    }
    sum_samples<C, 2 * kHalf, kCount>(sums);
  }
}

// held[b * kLanes + r * kSamples + s] = sample b * kSamples + s of row r.
template <class C, int kVecs>
inline void interleave(const C* tile, C* held) {
  constexpr int kWidth = kVecs * kLanes<C>;
  for (int64_t r = 0; r < kGroupRows; ++r) {
    for (int64_t i = 0; i < kWidth; ++i) {
      held[i / kSamples<C> * kLanes<C> + r * kSamples<C> + i % kSamples<C>] = tile[r * kWidth + i];
    }
  }
}

// The gradients of kGroupRows rows at kLanes entries per step; no sum over lanes is needed, since a
// vector's lanes are rows.
template <class C, int kVecs>
inline void group_inner_products(const C* held, const int32_t* columns, int64_t count,
                                 const C* panel, C* const* result) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  for (int64_t j = 0; j < count; j += kW) {
    const int64_t left = smaller(kW, count - j);
    const C* features[kW];
    for (int i = 0; i < kW; ++i) {
      features[i] = panel + static_cast<int64_t>(columns[j + (i < left ? i : 0)]) * kWidth;
    }
    Vec<C> sums[kW] = {};
    for (int b = 0; b < kWidth; b += kSamples<C>) {
      const Vec<C> gradient = load(held + b * kGroupRows);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) sums[i] += gradient * repeated<C>(features[i] + b);
    }
    sum_samples<C>(sums);
    for (int r = 0; r < static_cast<int>(kGroupRows); ++r) {
      C* target = result[r] + j;
      if (left == kW) {
        store(target, load(target) + sums[r]);
      } else {
        store_partial(target, load_partial(target, left) + sums[r], left);
      }
    }
  }
}

template <class T, int kVecs>
void values_gradient_of_group(const MaskedWeightGradient<T>& call, int64_t row, int64_t rows,
                              const Compute<T>* tile, const Compute<T>* panel, Compute<T>* held) {
  using C = Compute<T>;
  const int32_t* pointers = call.structure.pointers + row;
  const int32_t* columns = call.structure.columns + pointers[0];
  const int64_t count = pointers[1] - pointers[0];
  if constexpr (kSamples<C> > 0) {
    if (rows == kGroupRows) {
      interleave<C, kVecs>(tile, held);
      C* result[kGroupRows];
      for (int r = 0; r < kGroupRows; ++r) result[r] = call.values_gradient + pointers[r];
      return group_inner_products<C, kVecs>(held, columns, count, panel, result);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    row_inner_products<C, kVecs>(tile + r * kVecs * kLanes<T>, columns, count, panel,
                                 call.values_gradient + pointers[r]);
  }
}

}  // namespace

template <class T>
int64_t block_lanes() {
  return kPanelVecs * kLanes<T>;
}

template <class T>
int64_t block_scratch(int64_t width) {
  return (width + kTileRows) * kPanelVecs * kLanes<T>;
}

template <class T>
void block_product(const MaskedProduct<T>& call, const RowGroups& groups, int64_t begin,
                   int64_t end, Working<T>* scratch) {
  const int64_t lanes = block_lanes<T>();
  Compute<T>* panel = scratch + kTileRows * lanes;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / call.row_splits * lanes, split = item % call.row_splits;
    const int64_t count = smaller(lanes, call.input.count - sample);
    const int64_t first = group_split(call.structure, groups, split, call.row_splits);
    const int64_t last = group_split(call.structure, groups, split + 1, call.row_splits);
    with_panel_width<T>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value;
      if (packed != sample) {
        pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      }
      product_groups<T, kVecs>(call, groups, first, last, sample, count, panel, scratch);
    });
    packed = sample;
  }
}

template <class T>
void block_weight_gradient(const MaskedWeightGradient<T>& call, const RowGroups& groups,
                           int64_t begin, int64_t end, Working<T>* scratch) {
  using C = Compute<T>;
  const int64_t lanes = block_lanes<T>();
  C* held = scratch + kGroupRows * lanes;
  C* panel = scratch + kTileRows * lanes;
  for (int64_t sample = 0; sample < call.input.count; sample += lanes) {
    const int64_t count = smaller(lanes, call.input.count - sample);
    with_panel_width<T>(count, [&](auto width) {
      constexpr int kVecs = decltype(width)::value, kWidth = kVecs * kLanes<T>;
      if (call.values_gradient != nullptr) {
        pack<T, kVecs>(call.input, sample, count, 0, call.structure.width, panel);
      }
      for (int64_t group = begin; group < end; ++group) {
        const int64_t row = groups.starts[group], rows = groups.starts[group + 1] - row;
        pack<T, kVecs>(call.gradient, sample, count, row, row + rows, scratch);
        if (call.values_gradient != nullptr) {
          values_gradient_of_group<T, kVecs>(call, row, rows, scratch, panel, held);
        }
        for (int64_t r = 0; call.bias_gradient != nullptr && r < rows; ++r) {
          Vec<C> sum = load(scratch + r * kWidth);
          for (int v = 1; v < kVecs; ++v) sum += load(scratch + r * kWidth + v * kLanes<T>);
          call.bias_gradient[row + r] += sum_lanes<C>(sum);
        }
      }
    });
  }
}

#define TSCNC_INSTANTIATE(T)                                                                  \
  template int64_t block_lanes<T>();                                                          \
  template int64_t block_scratch<T>(int64_t);                                                 \
  template void block_product<T>(const MaskedProduct<T>&, const RowGroups&, int64_t, int64_t, \
                                 Working<T>*);                                                \
  template void block_weight_gradient<T>(const MaskedWeightGradient<T>&, const RowGroups&,    \
                                         int64_t, int64_t, Working<T>*);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
