#include "sparsity.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tscnc::TSCNC_ISA {
namespace {

typedef uint8_t EightBytes __attribute__((vector_size(8)));
typedef int32_t EightPlaces __attribute__((vector_size(32)));
typedef uint64_t FourWords __attribute__((vector_size(32)));

// Where the bits of each byte are set, in rising order.
struct PlacesOfBytes {
  uint8_t places[256][8];
};
constexpr PlacesOfBytes places_of_bytes() {
  PlacesOfBytes table{};
  for (int byte = 0; byte < 256; ++byte) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if ((byte >> bit & 1) != 0) table.places[byte][count++] = static_cast<uint8_t>(bit);
    }
  }
  return table;
}
alignas(64) constexpr PlacesOfBytes kPlaces = places_of_bytes();

// Sparser than one set bit in so many, most words of 64 bits hold no more than four, or two, or
// none.
constexpr int64_t kFourOrFewer = 16, kTwoOrFewer = 64, kMostlyNone = 256;
// Entries that one word of bits may be written to, those behind its own included.
constexpr int64_t kWritten = 64 + 8;

// Bit i: whether byte i of mask[0 .. 8) is non-zero.
inline uint64_t pack_eight(uint64_t bytes) {
  constexpr uint64_t kLow = 0x0101010101010101, kSeven = 0x7f7f7f7f7f7f7f7f;
  const uint64_t flags = ((((bytes & kSeven) + kSeven) | bytes) >> 7) & kLow;
  // The product moves flag i to bit 56 + i.
  return (flags * 0x0102040810204080) >> 56;
}

inline uint64_t pack_word(const uint8_t* mask) {
#if defined(__AVX2__)
  uint32_t halves[2];
  for (int half = 0; half < 2; ++half) {
    const auto* bytes = reinterpret_cast<const __m256i*>(mask + 32 * half);
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_loadu_si256(bytes), _mm256_setzero_si256());
    halves[half] = ~static_cast<uint32_t>(_mm256_movemask_epi8(zero));
  }
  return halves[0] | static_cast<uint64_t>(halves[1]) << 32;
#else
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t bytes;
    std::memcpy(&bytes, mask + 8 * i, sizeof(bytes));
    word |= pack_eight(bytes) << (8 * i);
  }
  return word;
#endif
}

// The 64 bits from one of the buffer's bits on, zeros behind its end.
inline uint64_t bits_at(const BitRows& bits, int64_t bit) {
  const int64_t byte = bit >> 3, shift = bit & 7, left = bits.bytes - byte;
  uint64_t low = 0, high = 0;
  if (__builtin_expect(left > 8, 1)) {
    std::memcpy(&low, bits.data + byte, 8);
    high = bits.data[byte + 8];
  } else {
    std::memcpy(&low, bits.data + byte, static_cast<size_t>(left));
  }
  return low >> shift | (high << 1) << (63 - shift);
}

// The lowest `count` bits of a word, at most 64.
inline uint64_t lowest(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~0ULL; }

// Calls visit(row, column, word) for the words of 64 columns of every row, or fewer at its end.
template <class Visit>
inline void for_words(const BitRows& bits, const Visit& visit) {
  const int64_t whole = bits.width / 64 * 64;
  for (int64_t row = 0; row < bits.rows; ++row) {
    const int64_t first = row * bits.width;
    if (bits.width % 64 == 0) {
      for (int64_t column = 0; column < whole; column += 64) {
        uint64_t word;
        std::memcpy(&word, bits.data + (first + column) / 8, sizeof(word));
        visit(row, column, word);
      }
      continue;
    }
    for (int64_t column = 0; column < whole; column += 64) {
      visit(row, column, bits_at(bits, first + column));
    }
    visit(row, whole, bits_at(bits, first + whole) & lowest(bits.width - whole));
  }
}

// Both write the places of the word's bits, counted from `base`, and something behind them.
template <int step>
inline void write_few(uint64_t word, int64_t base, int32_t* places) {
  do {
    for (int i = 0; i < step; ++i, word &= word - 1) {
      // Of a word of zeros, whatever ctz makes of it is written over or left behind.
      places[i] = static_cast<int32_t>(base + __builtin_ctzll(word | (uint64_t{1} << 63)));
    }
    places += step;
  } while (__builtin_expect(word != 0, 0));
}

// The places of a byte's bits, each more by `base`.
inline void places_of(uint64_t byte, int32_t base, EightPlaces* places) {
#if defined(__AVX2__)
  const __m128i found =
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.places[byte & 255]));
  *places = reinterpret_cast<EightPlaces>(_mm256_cvtepu8_epi32(found)) + base;
#else
  EightBytes found;
  std::memcpy(&found, kPlaces.places[byte & 255], sizeof(found));
  *places = __builtin_convertvector(found, EightPlaces) + base;
#endif
}

inline void write_many(uint64_t word, int64_t base, int32_t* places) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i, word >>= 8) {
    EightPlaces found;
    places_of(word, static_cast<int32_t>(base + 8 * i), &found);
    std::memcpy(places, &found, sizeof(found));
    places += __builtin_popcountll(word & 255);
  }
}

inline void write_each(uint64_t word, int64_t base, int32_t* places) {
  for (; word != 0; word &= word - 1) {
    *places++ = static_cast<int32_t>(base + __builtin_ctzll(word));
  }
}

// `few`: write so many places of a word at a time, or 0 to write them byte by byte.
template <int few>
inline void write_word(uint64_t word, int64_t base, int32_t* places) {
  if constexpr (few > 0) {
    write_few<few>(word, base, places);
  } else {
    write_many(word, base, places);
  }
}

template <int few, bool skip>
void list_rows(const BitRows bits, int64_t kept, int32_t* columns) {
  int64_t next = 0;
  for_words(bits, [&](int64_t, int64_t column, uint64_t word) {
    if (skip && word == 0) return;
    if (__builtin_expect(next + kWritten > kept, 0)) {
      write_each(word, column, columns + next);
    } else {
      write_word<few>(word, column, columns + next);
    }
    next += __builtin_popcountll(word);
  });
}

// Ranks of the set bits of `after` among those of `before`, word by word. Between the words that
// differ they follow one another, and are written when the next such word is met.
struct BitMap {
  int64_t* places;
  int64_t rank, entry, written;

  void write_pending() {
    const int64_t shift = rank - entry;
    for (int64_t i = written; i < entry; ++i) places[i] = i + shift;
    written = entry;
  }

  void add(uint64_t before, uint64_t after) {
    if (__builtin_expect(before != after, 0)) {
      write_pending();
      for (uint64_t left = after; left != 0; left &= left - 1) {
        const uint64_t bit = left & -left;
        places[written++] = before & bit ? rank + __builtin_popcountll(before & (bit - 1)) : -1;
      }
    }
    rank += __builtin_popcountll(before);
    entry += __builtin_popcountll(after);
  }
};

// Swaps `size` x `size` squares of bits off the diagonal among eight rows, `step` rows apart, of
// four 64 x 64 matrices.
template <int size, int step>
inline void swap_squares(FourWords* rows) {
  constexpr uint64_t kMask = ~uint64_t{0} / ((uint64_t{1} << size) + 1);
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) {
    constexpr int kApart = size / step;
    if ((row & kApart) != 0) continue;
    const FourWords swapped = ((rows[row] >> size) ^ rows[row | kApart]) & kMask;
    rows[row] ^= swapped << size;
    rows[row | kApart] ^= swapped;
  }
}

// Three of the six halvings at a time, so that the eight rows that they mix stay in registers.
template <int step>
inline void transpose_step(FourWords* rows) {
  for (int group = 0; group < 8; ++group) {
    FourWords* first = rows + (step == 1 ? 8 * group : group);
    FourWords held[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) held[i] = first[i * step];
    swap_squares<4 * step, step>(held);
    swap_squares<2 * step, step>(held);
    swap_squares<step, step>(held);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) first[i * step] = held[i];
  }
}

// strip_words(rows) words of each of the columns [column, column + 64); zeros behind their ends.
// `aligned`: rows begin at whole words.
template <bool aligned>
void transpose_strip(const BitRows& bits, int64_t column, uint64_t* strip) {
  const int64_t words = strip_words(bits.rows);
  for (int64_t word = 0; word < words; word += 4) {
    FourWords tile[64];
    const bool whole = 64 * (word + 4) <= bits.rows;
    for (int64_t i = 0; i < 64; ++i) {
      uint64_t parts[4];
#pragma GCC unroll 4
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t row = 64 * (word + part) + i, bit = row * bits.width + column;
        if (aligned && whole) {
          std::memcpy(&parts[part], bits.data + bit / 8, sizeof(uint64_t));
        } else {
          parts[part] = row < bits.rows ? bits_at(bits, bit) : 0;
        }
      }
      tile[i] = FourWords{parts[0], parts[1], parts[2], parts[3]};
    }
    transpose_step<8>(tile);
    transpose_step<1>(tile);
    for (int64_t i = 0; i < 64; ++i) std::memcpy(strip + i * words + word, &tile[i], 32);
  }
}

// Writes the rows of a column's word and takes their next places; and something behind both.
inline void write_column_word(uint64_t word, int64_t base, int32_t* next, int32_t* rows,
                              int32_t* permutation) {
#if defined(__AVX2__)
  // The bits of four bytes in every lane.
  const EightPlaces halves[2] = {EightPlaces{} + static_cast<int32_t>(word),
                                 EightPlaces{} + static_cast<int32_t>(word >> 32)};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i, word >>= 8) {
    constexpr EightPlaces kBits = {1, 2, 4, 8, 16, 32, 64, 128};
    const EightPlaces lane_bits = kBits << (8 * (i % 4));
    EightPlaces found;
    places_of(word, static_cast<int32_t>(base + 8 * i), &found);
    EightPlaces places, lanes;
    places_of(word, 0, &lanes);
    std::memcpy(&places, next + base + 8 * i, sizeof(places));
    const EightPlaces taken = __builtin_shuffle(places, lanes);
    places -= (halves[i / 4] & lane_bits) == lane_bits;
    std::memcpy(next + base + 8 * i, &places, sizeof(places));
    std::memcpy(rows, &found, sizeof(found));
    std::memcpy(permutation, &taken, sizeof(taken));
    const int count = __builtin_popcountll(word & 255);
    rows += count;
    permutation += count;
  }
#else
  for (; word != 0; word &= word - 1) {
    const int64_t row = base + __builtin_ctzll(word);
    *rows++ = static_cast<int32_t>(row);
    *permutation++ = next[row]++;
  }
#endif
}

}  // namespace

void pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits) {
  int64_t begin = 0;
  for (; begin + 64 <= count; begin += 64) {
    const uint64_t word = pack_word(mask + begin);
    std::memcpy(bits + begin / 8, &word, sizeof(word));
  }
  for (; begin < count; begin += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, mask + begin, static_cast<size_t>(count - begin < 8 ? count - begin : 8));
    bits[begin / 8] = static_cast<uint8_t>(pack_eight(bytes));
  }
}

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0, byte = 0;
  for (; byte + 8 <= bytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, bits + byte, sizeof(word));
    count += __builtin_popcountll(word);
  }
  for (; byte < bytes; ++byte) count += __builtin_popcount(bits[byte]);
  return count;
}

void count_rows(const BitRows& bits, int64_t* pointers) {
  pointers[0] = 0;
  for (int64_t row = 0; row < bits.rows; ++row) pointers[row + 1] = 0;
  for_words(bits, [&](int64_t row, int64_t, uint64_t word) {
    pointers[row + 1] += __builtin_popcountll(word);
  });
  for (int64_t row = 0; row < bits.rows; ++row) pointers[row + 1] += pointers[row];
}

void list_bits(const BitRows& bits, int64_t kept, int32_t* columns) {
  const int64_t size = bits.rows * bits.width;
  const auto list = kept * kMostlyNone < size    ? list_rows<2, true>
                    : kept * kTwoOrFewer < size  ? list_rows<2, false>
                    : kept * kFourOrFewer < size ? list_rows<4, false>
                                                 : list_rows<0, false>;
  list(bits, kept, columns);
}

void list_columns(const BitRows& bits, int64_t kept, int32_t* next, uint64_t* strip,
                  const ColumnList& list) {
  const int64_t words = strip_words(bits.rows);
  const auto transpose = bits.width % 64 == 0 ? transpose_strip<true> : transpose_strip<false>;
  int64_t done = 0;
  for (int64_t column = 0; column < bits.width; ++column) {
    const int64_t place = column % kStripColumns;
    if (place == 0) transpose(bits, column, strip);
    list.pointers[column] = static_cast<int32_t>(done);
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = strip[place * words + w];
      int32_t* rows = list.rows + done;
      int32_t* permutation = list.permutation + done;
      done += __builtin_popcountll(word);
      if (__builtin_expect(done + kWritten <= kept, 1)) {
        write_column_word(word, 64 * w, next, rows, permutation);
        continue;
      }
      for (uint64_t left = word; left != 0; left &= left - 1) {
        const int64_t row = 64 * w + __builtin_ctzll(left);
        *rows++ = static_cast<int32_t>(row);
        *permutation++ = next[row]++;
      }
    }
  }
  list.pointers[bits.width] = static_cast<int32_t>(done);
}

void map_bits(const uint8_t* before, const uint8_t* after, int64_t bytes, int64_t* places) {
  BitMap map{places, 0, 0, 0};
  int64_t byte = 0;
  for (; byte + 8 <= bytes; byte += 8) {
    uint64_t was, is;
    std::memcpy(&was, before + byte, sizeof(was));
    std::memcpy(&is, after + byte, sizeof(is));
    map.add(was, is);
  }
  for (; byte < bytes; ++byte) map.add(before[byte], after[byte]);
  map.write_pending();
}

}  // namespace tscnc::TSCNC_ISA
