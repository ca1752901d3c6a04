// C += A'A for the upper triangle of an fp64 matrix C, the products summed in fp32 or fp64, from A
// packed into strips of columns.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace tscnc::TSCNC_ISA {

// The register tile: kTileRows rows by a strip of three vectors of T.
constexpr int64_t kTileRows = kVectorBytes / 8;
template <class T>
constexpr int64_t kStripOf = 3 * kLanes<T>;
// Rows of A in one update: their packed strips stay in L2, a tile's share of them in L1.
template <class T>
constexpr int64_t kUpdateDepth = 1024 / static_cast<int64_t>(sizeof(T));

// fp64 elements that the strips of kUpdateDepth rows and n columns take, whatever T.
constexpr int64_t packed_size(int64_t n) { return (n + 48) * kUpdateDepth<double>; }

// Columns [0, count) of `depth` rows as strips, each strip row by row. Reads whole vectors.
template <class T>
inline void pack_strips(const double* rows, int64_t ld, int64_t depth, int64_t count, T* packed) {
  constexpr int64_t kWide = kStripOf<T>;
  for (int64_t j = 0; j < count; j += kWide) {
    const int64_t width = count - j < kWide ? count - j : kWide;
    for (int64_t k = 0; k < depth; ++k, packed += kWide) {
      const double* source = rows + k * ld + j;
      for (int64_t c = 0; c < width; ++c) packed[c] = static_cast<T>(source[c]);
      for (int64_t c = width; c < kWide; ++c) packed[c] = 0;
    }
  }
}

// kLanes<T> elements of any type as a vector of T. The compiler converts wide vectors of floats in
// halves that meet in memory.
template <class T, class S>
inline Vec<T> load_as(const S* source) {
  if constexpr (std::is_same_v<T, S>) {
    return load(source);
#if defined(__AVX512F__) && !defined(TSCNC_WIDE_VECTORS)
  } else if constexpr (std::is_same_v<S, float>) {
    return (Vec<T>)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(source));
#elif defined(__AVX2__) && !defined(TSCNC_WIDE_VECTORS)
  } else if constexpr (std::is_same_v<S, float>) {
    return (Vec<T>)_mm256_cvtps_pd(_mm_loadu_ps(source));
#endif
  } else {
    using Narrow __attribute__((vector_size(kLanes<T> * sizeof(S)))) = S;
    Narrow narrow;
    std::memcpy(&narrow, source, sizeof(narrow));
    return __builtin_convertvector(narrow, Vec<T>);
  }
}

// Transposes a square of kLanes<T> vectors by swapping off-diagonal blocks of half the size each
// time (Eklundh 1972).
template <class T, int kHalf, int... kLane>
inline void swap_blocks(Vec<T>* square, std::integer_sequence<int, kLane...>) {
  constexpr int kSide = kLanes<T>;
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Indices __attribute__((vector_size(kVectorBytes))) = Index;
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if ((i & kHalf) != 0) continue;
    const Vec<T> a = square[i], b = square[i + kHalf];
    square[i] =
        __builtin_shuffle(a, b, Indices{((kLane & kHalf) == 0 ? kLane : kSide + kLane - kHalf)...});
    square[i + kHalf] =
        __builtin_shuffle(a, b, Indices{((kLane & kHalf) == 0 ? kLane + kHalf : kSide + kLane)...});
  }
  if constexpr (kHalf > 1) {
    swap_blocks<T, kHalf / 2>(square, std::integer_sequence<int, kLane...>());
  }
}

template <class T>
inline void transpose(Vec<T>* square) {
  swap_blocks<T, kLanes<T> / 2>(square, std::make_integer_sequence<int, kLanes<T>>());
}

// As pack_strips for the scaled transpose of `rows`: `count` rows of S, their elements [0, depth).
template <class T, class S>
inline void pack_transposed(const S* rows, int64_t stride, int64_t depth, int64_t count, T scale,
                            T* packed) {
  constexpr int64_t kWide = kStripOf<T>, kSide = kLanes<T>;
  for (int64_t j = 0; j < count; j += kWide, packed += kWide * depth) {
    for (int64_t c = 0; c < kWide; c += kSide) {
      const S* source = rows + (j + c) * stride;
      const int64_t width = count - j - c < kSide ? (count - j - c > 0 ? count - j - c : 0) : kSide;
      int64_t k = 0;
      for (; k + kSide <= depth; k += kSide) {
        Vec<T> square[kSide];
        if (width == kSide) {
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; ++r) square[r] = load_as<T>(source + r * stride + k);
        } else {
          for (int64_t r = 0; r < kSide; ++r) {
            square[r] = r < width ? load_as<T>(source + r * stride + k) : Vec<T>{};
          }
        }
        transpose<T>(square);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kSide; ++r) store(packed + (k + r) * kWide + c, scale * square[r]);
      }
      for (; k < depth; ++k) {
        for (int64_t r = 0; r < kSide; ++r) {
          packed[k * kWide + c + r] =
              r < width ? scale * static_cast<T>(source[r * stride + k]) : 0;
        }
      }
    }
  }
}

// Vectors [kFirst, kLast) of one tile of C += sign * A'B over packed strips.
template <int kSign, int kFirst, int kLast, class T>
inline void update_tile(const T* a, const T* b, int64_t depth, double* c, int64_t ld) {
  constexpr int64_t kWide = kStripOf<T>, kLane = kLanes<T>;
  Vec<T> sum[kTileRows][3] = {};
  for (int64_t k = 0; k < depth; ++k, a += kWide, b += kWide) {
    Vec<T> right[3];
    for (int64_t s = kFirst; s < kLast; ++s) right[s] = load(b + s * kLane);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; ++r) {
      const Vec<T> scale = broadcast(a[r]);
      for (int64_t s = kFirst; s < kLast; ++s) sum[r][s] += scale * right[s];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r, c += ld) {
    for (int64_t s = kFirst; s < kLast; ++s) {
      double* target = c + s * kLane;
      T found[kLane];
      store(found, sum[r][s]);
      for (int64_t l = 0; l < kLane; ++l) target[l] += kSign * static_cast<double>(found[l]);
    }
  }
}

template <int kSign, int kFirst, class T>
inline void update_tile(int64_t last, const T* a, const T* b, int64_t depth, double* c,
                        int64_t ld) {
  if (last == 3) return update_tile<kSign, kFirst, 3>(a, b, depth, c, ld);
  if (kFirst < 2 && last == 2) return update_tile<kSign, kFirst, 2>(a, b, depth, c, ld);
  if (kFirst < 1) update_tile<kSign, kFirst, 1>(a, b, depth, c, ld);
}

// Upper triangle of C (count x count) += sign * P'P, P packed from `depth` rows. Writes columns up
// to the end of the last strip, zeros behind `count`.
template <int kSign, class T>
inline void rank_update(const T* packed, int64_t depth, int64_t count, double* c, int64_t ld) {
  constexpr int64_t kWide = kStripOf<T>, kLane = kLanes<T>;
  for (int64_t j = 0; j < count; j += kWide) {
    const int64_t left = count - j, last = left < kWide ? (left + kLane - 1) / kLane : 3;
    for (int64_t i = 0; i <= j; i += kWide) {
      for (int64_t r = 0; r < kWide && i + r < count; r += kTileRows) {
        const T *a = packed + i * depth + r, *b = packed + j * depth;
        double* target = c + (i + r) * ld + j;
        // Vectors left of the diagonal are skipped.
        const int64_t first = i < j ? 0 : r / kLane;
        if (first == 0) update_tile<kSign, 0>(last, a, b, depth, target, ld);
        if (first == 1) update_tile<kSign, 1>(last, a, b, depth, target, ld);
        if (first == 2) update_tile<kSign, 2>(last, a, b, depth, target, ld);
      }
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
