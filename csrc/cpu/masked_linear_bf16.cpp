#include "masked_linear_bf16.h"

#include <immintrin.h>

#include "panel.h"
#include "vec.h"
#if defined(TSCNC_WIDE_VECTORS)
#include "avx512_bf16_emulation.h"
#endif

namespace tscnc::TSCNC_ISA {
namespace {

using Sum = Vec<float>;

// As in masked_linear.cpp: sums of a full panel's row in vectors, and results transposed together.
constexpr int kPanelVecs = 4;
constexpr int kLane = kLanes<bf16>;
constexpr int64_t kTileRows = 64;
// Weights of a row that are narrowed at a time; even.
constexpr int64_t kWeights = 256;

inline __m512i load_words(const bf16* source) {
  __m512i result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

// The bits of a bfloat16 in every lane, rounded to nearest even.
inline __m512i rounded(Sum value) {
  const auto bits = bit_cast<Vec<uint32_t>>(value);
  const Vec<uint32_t> nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (__m512i)(value == value ? nearest : (bits >> 16) | 0x40);
}

// Features [begin, end) of a panel of 16 bits. 32 samples fill a vector in such an order that
// interleaving two features leaves samples 0 to 15 in the low halves and 16 to 31 in the high ones.
template <int kVecs>
void pack_words(const Samples<bf16>& source, int64_t sample, int64_t count, float* tile,
                bf16* panel) {
  constexpr int kWidth = kVecs * kLane;
  for (int64_t begin = 0; begin < source.features; begin += kTileRows) {
    const int64_t left = source.features - begin, rows = left < kTileRows ? left : kTileRows;
    pack<bf16, kVecs>(source, sample, count, begin, begin + rows, tile);
    for (int64_t i = 0; i < rows * kWidth; i += 2 * kLane) {
      const __m512i words =
          _mm512_packus_epi32(rounded(load(tile + i)), rounded(load(tile + i + kLane)));
      std::memcpy(panel + begin * kWidth + i, &words, sizeof(words));
    }
  }
}

// sum[v] += sum over j of weights[j] * panel[columns[j]] by pairs of j; an odd last one is paired
// with the panel's row of zeros, so that no sample's infinity meets a weight that is not kept.
template <int kVecs>
inline void add_row_pairs(const bf16* weights, const int32_t* columns, int64_t count,
                          const bf16* panel, const bf16* zeros, Sum* sum) {
  constexpr int kWidth = kVecs * kLane, kSets = kVecs == 4 ? 2 : 4;
  const auto row = [&](int64_t j) { return panel + static_cast<int64_t>(columns[j]) * kWidth; };
  const auto add = [&](int64_t j, const bf16* second, Sum* part) {
    int32_t pair;
    std::memcpy(&pair, weights + j, sizeof(pair));
    const auto weight = (__m512bh)(broadcast(pair));
    const bf16* first = row(j);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v += 2) {
      const __m512i a = load_words(first + v * kLane), b = load_words(second + v * kLane);
      const auto low = (__m512bh)_mm512_unpacklo_epi16(a, b);
      const auto high = (__m512bh)_mm512_unpackhi_epi16(a, b);
      part[v] = (Sum)_mm512_dpbf16_ps((__m512)part[v], low, weight);
      part[v + 1] = (Sum)_mm512_dpbf16_ps((__m512)part[v + 1], high, weight);
    }
  };
  Sum part[kSets - 1][kVecs] = {};
  int64_t j = 0;
  for (; j + 2 * kSets <= count; j += 2 * kSets) {
    add(j, row(j + 1), sum);
#pragma GCC unroll 4
    for (int u = 1; u < kSets; ++u) add(j + 2 * u, row(j + 2 * u + 1), part[u - 1]);
  }
  for (int u = 0; u < kSets - 1; ++u) {
    for (int v = 0; v < kVecs; ++v) sum[v] += part[u][v];
  }
  for (; j + 2 <= count; j += 2) add(j, row(j + 1), sum);
  if (j < count) add(j, zeros, sum);
}

// As add_row_product in panel.h. The values had 16 bits before and lose nothing.
template <int kVecs>
void add_row_product(const float* values, const int32_t* columns, int64_t count, const bf16* panel,
                     const bf16* zeros, Sum* sum) {
  for (int64_t begin = 0; begin < count; begin += kWeights) {
    const int64_t part = count - begin < kWeights ? count - begin : kWeights;
    bf16 weights[kWeights + 1];
    int64_t j = 0;
    for (; j + kLane <= part; j += kLane) store(weights + j, load(values + begin + j));
    if (j < part) store_partial(weights + j, load_partial(values + begin + j, part - j), part - j);
    weights[part].bits = 0;
    add_row_pairs<kVecs>(weights, columns + begin, part, panel, zeros, sum);
  }
}

template <int kVecs>
void product_tile(const MaskedProduct<bf16>& call, int64_t row, int64_t rows, int64_t sample,
                  int64_t count, const bf16* panel, float* tile) {
  constexpr int kWidth = kVecs * kLane;
  const bf16* zeros = panel + call.structure.width * kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t begin = call.structure.pointers[row + r];
    const int32_t kept = call.structure.pointers[row + r + 1] - begin;
    const float bias = call.bias == nullptr ? 0 : load_partial(call.bias + row + r, 1)[0];
    Sum sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = broadcast(bias);
    add_row_product<kVecs>(call.values + begin, call.structure.columns + begin, kept, panel, zeros,
                           sum);
    for (int v = 0; v < kVecs; ++v) store(tile + r * kWidth + v * kLane, sum[v]);
  }
  finish_tile<bf16, kVecs>(tile, row, rows, sample, count, call.activation, call.preactivation,
                           call.output);
}

}  // namespace

int64_t masked_linear_bf16_lanes() { return kPanelVecs * kLane; }

// In floats: a tile of results and the panel with its row of zeros.
int64_t masked_linear_bf16_scratch(int64_t width) {
  return kPanelVecs * kLane * (kTileRows + (width + 2) / 2);
}

void masked_linear_bf16_product(const MaskedProduct<bf16>& call, int64_t begin, int64_t end,
                                float* scratch) {
  constexpr int64_t kFull = kPanelVecs * kLane;
  const int64_t width = call.structure.width;
  auto* panel = reinterpret_cast<bf16*>(scratch + kTileRows * kFull);
  int64_t packed = -1;
  const auto run_item = [&](auto vecs, int64_t sample, int64_t count, int64_t row_begin,
                            int64_t row_end) {
    constexpr int kVecs = decltype(vecs)::value;
    if (packed != sample) {
      pack_words<kVecs>(call.input, sample, count, scratch, panel);
      std::memset(panel + width * kVecs * kLane, 0, kVecs * kLane * sizeof(bf16));
    }
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
      const int64_t rows = row_end - row < kTileRows ? row_end - row : kTileRows;
      product_tile<kVecs>(call, row, rows, sample, count, panel, scratch);
    }
    packed = sample;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / call.row_splits * kFull, split = item % call.row_splits;
    const int64_t left = call.input.count - sample, count = left < kFull ? left : kFull;
    const int64_t row_begin = row_split(call.structure, split, call.row_splits);
    const int64_t row_end = row_split(call.structure, split + 1, call.row_splits);
    if (count <= 2 * kLane) {
      run_item(std::integral_constant<int, 2>(), sample, count, row_begin, row_end);
    } else {
      run_item(std::integral_constant<int, kPanelVecs>(), sample, count, row_begin, row_end);
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
