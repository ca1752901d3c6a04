// Panels: a group of samples stored feature by feature, panel[feature * lanes + sample], so that
// one weight meets all samples of the group in vector registers. Packing transposes rows of samples
// into a panel; unpacking transposes a tile of results back.
//
// A panel is kVecs vectors wide. C is the arithmetic type, T the storage type.
#pragma once

#include <utility>

#include "gelu.h"
#include "include/activation.h"
#include "masked_linear.h"
#include "transpose.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {

template <class C>
inline Vec<C> activate(Vec<C> value, Activation activation) {
  if (activation == Activation::relu) return value < 0 ? Vec<C>{} : value;
  if (activation == Activation::gelu) return gelu<C>(value);
  return value;
}

// gradient * act'(z); `saved` is the activation's result for relu and z for gelu.
template <class C>
inline Vec<C> activation_gradient(Vec<C> gradient, Vec<C> saved, Activation activation) {
  if (activation == Activation::relu) return saved <= 0 ? Vec<C>{} : gradient;
  if (activation == Activation::gelu) return gradient * gelu_gradient<C>(saved);
  return gradient;
}

// Lanes [0, count) hold elements that lie `stride` apart; the others are zero.
template <class T>
inline Vec<Compute<T>> load_strided(const T* data, int64_t stride, int64_t count) {
  if (stride == 1) return count == kLanes<T> ? load(data) : load_partial(data, count);
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = data[i * stride];
  return load(buffer);
}

// Lanes [0, count) hold kLanes features of one sample; the others are zero.
template <class T>
inline Vec<Compute<T>> load_features(const Samples<T>& source, int64_t sample, int64_t feature,
                                     int64_t count) {
  const Vec<Compute<T>> value =
      load_strided(source.data + sample * source.sample_stride + feature * source.feature_stride,
                   source.feature_stride, count);
  if (source.saved == nullptr) return value;
  const T* saved = source.saved + sample * source.saved_sample_stride;
  return activation_gradient<Compute<T>>(value,
                                         load_strided(saved + feature * source.saved_feature_stride,
                                                      source.saved_feature_stride, count),
                                         source.activation);
}

// Lanes [0, count) hold one feature of kLanes samples, where samples lie next to each other.
template <class T>
inline Vec<Compute<T>> load_samples(const Samples<T>& source, int64_t sample, int64_t feature,
                                    int64_t count) {
  const Vec<Compute<T>> value =
      load_strided(source.data + feature * source.feature_stride + sample, 1, count);
  if (source.saved == nullptr) return value;
  return activation_gradient<Compute<T>>(
      value, load_strided(source.saved + feature * source.saved_feature_stride + sample, 1, count),
      source.activation);
}

// Whether a panel's rows are runs of memory.
template <class T>
inline bool is_feature_major(const Samples<T>& source) {
  return source.sample_stride == 1 && source.feature_stride != 1 &&
         (source.saved == nullptr || source.saved_sample_stride == 1);
}

// Up to kLanes features of up to kLanes samples into a panel kWidth wide.
template <class T, int kWidth>
inline void pack_square(const Samples<T>& source, int64_t sample, int64_t present, int64_t feature,
                        int64_t left, Compute<T>* target) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  if (is_feature_major(source)) {
    for (int i = 0; i < left; ++i) {
      store(target + i * kWidth, load_samples(source, sample, feature + i, present));
    }
    return;
  }
  if (present == kW && left == kW) {
    Vec<C> rows[kW];  // stays in registers: every loop over it is of constant length
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = load_features(source, sample + i, feature, kW);
    transpose<C>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) store(target + i * kWidth, rows[i]);
    return;
  }
  Vec<C> rows[kW];
  for (int i = 0; i < kW; ++i) {
    rows[i] = i < present ? load_features(source, sample + i, feature, left) : Vec<C>{};
  }
  transpose<C>(rows);
  for (int i = 0; i < left; ++i) store(target + i * kWidth, rows[i]);
}

// The short pieces of many rows that a transposition reads or writes are beyond the hardware's
// prefetching.
template <class T, int kCount, int kWrite = 0>
inline void fetch_ahead(const T* data) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(data + i, kWrite);
  }
}

// Calls function with the number of vectors, a power of two up to kMost, of the narrowest panel
// that holds `count` samples.
template <class T, int kMost, int kVecs = 1, class Function>
inline void with_panel_width(int64_t count, const Function& function) {
  if constexpr (kVecs < kMost) {
    if (count > kVecs * kLanes<T>) return with_panel_width<T, kMost, 2 * kVecs>(count, function);
  }
  function(std::integral_constant<int, kVecs>());
}

// As many of `features` features of kLanes samples as fill whole cache lines, row-major input;
// returns how many. `stride` lies between samples.
template <class T, int kWidth>
inline int64_t pack_lines(const T* source, int64_t stride, int64_t features, Compute<T>* target) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kLine = 64 / sizeof(T), kAhead = 2 * kLine;
  int64_t done = 0;
  for (; done + kLine <= features; done += kLine) {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) __builtin_prefetch(source + i * stride + done + kAhead);
#pragma GCC unroll 4
    for (int part = 0; part < kLine; part += kW) {
      Vec<C> rows[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) rows[i] = load(source + i * stride + done + part);
      transpose<C>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) store(target + (done + part + i) * kWidth, rows[i]);
    }
  }
  return done;
}

// Features [begin, end) of `count` samples from `sample` on; lanes without a sample are zero.
//
// kLanes samples at a time for a long run of features: only that many of the input's rows are read
// side by side, for rows that are a power of two apart share one set of the cache, while the part
// of the panel that the run fills stays in the cache for the next samples.
template <class T, int kVecs>
void pack(const Samples<T>& source, int64_t sample, int64_t count, int64_t begin, int64_t end,
          Compute<T>* panel) {
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  constexpr int64_t kRun = 16384 / (kWidth * sizeof(Compute<T>));
  const bool plain = source.feature_stride == 1 && source.saved == nullptr;
  for (int64_t run = begin; run < end; run += kRun) {
    const int64_t stop = end - run < kRun ? end : run + kRun;
    for (int lane = 0; lane < kWidth; lane += kW) {
      const int64_t present = count - lane < kW ? (count > lane ? count - lane : 0) : kW;
      Compute<T>* target = panel + (run - begin) * kWidth + lane;
      const T* first = source.data + (sample + lane) * source.sample_stride + run;
      int64_t feature = run;
      if (plain && present == kW) {
        feature += pack_lines<T, kWidth>(first, source.sample_stride, stop - run, target);
      }
      for (; feature < stop; feature += kW) {
        pack_square<T, kWidth>(source, sample + lane, present, feature,
                               stop - feature < kW ? stop - feature : kW,
                               target + (feature - run) * kWidth);
      }
    }
  }
}

// kSquares * kLanes results of kLanes samples to row-major places, whole cache lines at once where
// that many squares fill one.
template <class T, int kWidth, int kSquares>
[[gnu::always_inline]] inline void unpack_squares(const Compute<T>* tile, T* output,
                                                  int64_t stride) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>;
  Vec<C> block[kSquares][kW];
#pragma GCC unroll 2
  for (int s = 0; s < kSquares; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) block[s][i] = load(tile + (s * kW + i) * kWidth);
    transpose<C>(block[s]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) {
#pragma GCC unroll 2
    for (int s = 0; s < kSquares; ++s) store(output + i * stride + s * kW, block[s][i]);
  }
}

// Writes a tile of `rows` results of a panel to rows [0, count) of a row-major matrix.
template <class T, int kVecs>
void unpack(const Compute<T>* tile, int64_t rows, int64_t count, T* output, int64_t stride) {
  using C = Compute<T>;
  constexpr int kW = kLanes<T>, kWidth = kVecs * kW;
  for (int lane = 0; lane < count; lane += kW) {
    const int64_t present = count - lane < kW ? count - lane : kW;
    const Compute<T>* from = tile + lane;
    T* target = output + lane * stride;
    int64_t row = 0;
    if (present == kW) {
      for (; row + 2 * kW <= rows; row += 2 * kW) {
        unpack_squares<T, kWidth, 2>(from + row * kWidth, target + row, stride);
      }
      for (; row + kW <= rows; row += kW) {
        unpack_squares<T, kWidth, 1>(from + row * kWidth, target + row, stride);
      }
    }
    for (; row < rows; row += kW) {
      const int64_t left = rows - row < kW ? rows - row : kW;
      Vec<C> block[kW] = {};
      for (int i = 0; i < left; ++i) block[i] = load(from + (row + i) * kWidth);
      transpose<C>(block);
      for (int i = 0; i < present; ++i) {
        if (left == kW) {
          store(target + i * stride + row, block[i]);
        } else {
          store_partial(target + i * stride + row, block[i], left);
        }
      }
    }
  }
}

// Writes a tile with `rows` features of `count` samples to the place of the first of each.
template <class T, int kVecs>
void write_tile(const Compute<T>* tile, int64_t row, int64_t rows, int64_t sample, int64_t count,
                const Results<T>& results) {
  constexpr int kW = kLanes<T>;
  T* target = results.data + sample * results.sample_stride + row * results.feature_stride;
  if (results.feature_stride == 1) {
    return unpack<T, kVecs>(tile, rows, count, target, results.sample_stride);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Compute<T>* from = tile + r * kVecs * kW;
    T* to = target + r * results.feature_stride;
    int64_t lane = 0;
    for (; lane + kW <= count; lane += kW) store(to + lane, load(from + lane));
    if (lane < count) store_partial(to + lane, load(from + lane), count - lane);
  }
}

// Writes a tile as above without the activation, unless that has no place, and with it.
template <class T, int kVecs>
void finish_tile(Compute<T>* tile, int64_t row, int64_t rows, int64_t sample, int64_t count,
                 Activation activation, const Results<T>& preactivation, const Results<T>& output) {
  using C = Compute<T>;
  if (preactivation.data != nullptr) {
    write_tile<T, kVecs>(tile, row, rows, sample, count, preactivation);
  }
  if (activation != Activation::none) {
    for (int64_t i = 0; i < rows * kVecs * kLanes<T>; i += kLanes<T>) {
      store(tile + i, activate<C>(load(tile + i), activation));
    }
  }
  write_tile<T, kVecs>(tile, row, rows, sample, count, output);
}

// sum[v] += sum over j of values[j] * panel[columns[j]], with enough independent sums to hide the
// latency of a multiply-add; their order is fixed.
template <class C, int kVecs, class Column>
inline void add_row_product(const C* values, const Column* columns, int64_t count, const C* panel,
                            Vec<C>* sum) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW, kSets = kVecs == 8 ? 1 : kVecs == 4 ? 2 : 4;
  const auto add = [&](int64_t j, Vec<C>* part) {
    const Vec<C> value = broadcast(values[j]);
    const C* row = panel + static_cast<int64_t>(columns[j]) * kWidth;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) part[v] += value * load(row + v * kW);
  };
  int64_t j = 0;
  if constexpr (kSets > 1) {
    Vec<C> part[kSets - 1][kVecs] = {};
    for (; j + kSets <= count; j += kSets) {
      add(j, sum);
#pragma GCC unroll 4
      for (int u = 1; u < kSets; ++u) add(j + u, part[u - 1]);
    }
    for (int u = 0; u < kSets - 1; ++u) {
      for (int v = 0; v < kVecs; ++v) sum[v] += part[u][v];
    }
  }
  for (; j < count; ++j) add(j, sum);
}

// Lane by lane, the products of the held vectors with a feature of a panel, added up.
template <class C, int kVecs>
inline Vec<C> lane_products(const Vec<C>* held, const C* feature) {
  constexpr int kW = kLanes<C>;
  if constexpr (kVecs == 1) return held[0] * load(feature);
  // Two chains: one of eight multiply-adds would wait for itself.
  Vec<C> even = held[0] * load(feature), odd = held[1] * load(feature + kW);
#pragma GCC unroll 8
  for (int v = 2; v < kVecs; v += 2) {
    even += held[v] * load(feature + v * kW);
    odd += held[v + 1] * load(feature + (v + 1) * kW);
  }
  return even + odd;
}

// result[j] += <gradient, panel[columns[j]]> over the lanes; the gradient's lanes stay in
// registers.
template <class C, int kVecs>
inline void row_inner_products(const C* gradient, const int32_t* columns, int64_t count,
                               const C* panel, C* result) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  Vec<C> held[kVecs];
  for (int v = 0; v < kVecs; ++v) held[v] = load(gradient + v * kW);
  const auto product = [&](int32_t column) {
    return lane_products<C, kVecs>(held, panel + static_cast<int64_t>(column) * kWidth);
  };
  int64_t j = 0;
  for (; j + kW <= count; j += kW) {
    store(result + j,
          load(result + j) + sum_each_of<C>([&](int i) { return product(columns[j + i]); }));
  }
  if (j == count) return;
  Vec<C> part[kW] = {};
  for (int i = 0; i < count - j; ++i) part[i] = product(columns[j + i]);
  C sums[kW];
  store(sums, sum_each<C>(part));
  for (int i = 0; i < count - j; ++i) result[j + i] += sums[i];
}

// result[r] += the sum of the lanes of row r of a tile.
template <class C, int kVecs>
void add_row_sums(const C* tile, int64_t rows, C* result) {
  constexpr int kW = kLanes<C>, kWidth = kVecs * kW;
  const auto lanes = [&](int64_t row) {
    Vec<C> sum = load(tile + row * kWidth);
    for (int v = 1; v < kVecs; ++v) sum += load(tile + row * kWidth + v * kW);
    return sum;
  };
  int64_t row = 0;
  for (; row + kW <= rows; row += kW) {
    store(result + row, load(result + row) + sum_each_of<C>([&](int i) { return lanes(row + i); }));
  }
  for (; row < rows; ++row) result[row] += sum_lanes<C>(lanes(row));
}

}  // namespace tscnc::TSCNC_ISA
