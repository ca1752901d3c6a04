#include "sparsity.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tscnc::TSCNC_ISA {
namespace {

typedef uint32_t Places __attribute__((vector_size(32)));
typedef uint64_t FourWords __attribute__((vector_size(32)));

// Where the bits of each byte are set, in rising order.
struct PlacesOfBytes {
  uint32_t places[256][8];
};
constexpr PlacesOfBytes places_of_bytes() {
  PlacesOfBytes table{};
  for (int byte = 0; byte < 256; ++byte) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if ((byte >> bit & 1) != 0) table.places[byte][count++] = static_cast<uint32_t>(bit);
    }
  }
  return table;
}
constexpr PlacesOfBytes kPlaces = places_of_bytes();

// Sparser than one set bit in so many, most words of 64 bits hold no more than four, or two.
constexpr int64_t kFourOrFewer = 16, kTwoOrFewer = 64;
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
  if (left > 8) {
    std::memcpy(&low, bits.data + byte, 8);
    high = bits.data[byte + 8];
  } else {
    std::memcpy(&low, bits.data + byte, static_cast<size_t>(left));
  }
  return low >> shift | (high << 1) << (63 - shift);
}

// Both write the places of the word's bits, counted from `base`, and something behind them.
template <int step>
inline void write_few(uint64_t word, int32_t base, int32_t* places) {
  do {
    for (int i = 0; i < step; ++i, word &= word - 1) {
      // Of a word of zeros, whatever ctz makes of it is written over or left behind.
      places[i] = base + __builtin_ctzll(word | (uint64_t{1} << 63));
    }
    places += step;
  } while (__builtin_expect(word != 0, 0));
}

inline void write_many(uint64_t word, int32_t base, int32_t* places) {
  Places first = Places{} + static_cast<uint32_t>(base);
  for (int i = 0; i < 8; ++i, word >>= 8, first += 8) {
    Places found;
    std::memcpy(&found, kPlaces.places[word & 255], sizeof(found));
    found += first;
    std::memcpy(places, &found, sizeof(found));
    places += __builtin_popcountll(word & 255);
  }
}

// `few`: write so many places of a word at a time, or 0 to write them byte by byte.
template <int few>
void list_rows(const BitRows bits, int64_t kept, int32_t* pointers, int32_t* columns) {
  int64_t next = 0;
  for (int64_t row = 0; row < bits.rows; ++row) {
    pointers[row] = static_cast<int32_t>(next);
    for (int64_t begin = 0; begin < bits.width; begin += 64) {
      uint64_t word = bits_at(bits, row * bits.stride + begin);
      if (bits.width - begin < 64) word &= (uint64_t{1} << (bits.width - begin)) - 1;
      const auto base = static_cast<int32_t>(begin);
      if (__builtin_expect(next + kWritten > kept, 0)) {
        for (; word != 0; word &= word - 1) columns[next++] = base + __builtin_ctzll(word);
        continue;
      }
      if constexpr (few > 0) {
        write_few<few>(word, base, columns + next);
      } else {
        write_many(word, base, columns + next);
      }
      next += __builtin_popcountll(word);
    }
  }
  pointers[bits.rows] = static_cast<int32_t>(next);
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

// In each of the four words' 64 x 64 bits, swaps the off-diagonal squares of ever smaller size.
inline void transpose_squares(FourWords* rows) {
  uint64_t mask = 0x00000000ffffffff;
  for (int size = 32; size > 0; size /= 2, mask ^= mask << size) {
    for (int row = 0; row < 64; row = ((row | size) + 1) & ~size) {
      const FourWords swapped = ((rows[row] >> size) ^ rows[row | size]) & mask;
      rows[row] ^= swapped << size;
      rows[row | size] ^= swapped;
    }
  }
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

void list_bits(const BitRows& bits, int64_t kept, int32_t* pointers, int32_t* columns) {
  const int64_t size = bits.rows * bits.width;
  const auto list = kept * kTwoOrFewer < size    ? list_rows<2>
                    : kept * kFourOrFewer < size ? list_rows<4>
                                                 : list_rows<0>;
  list(bits, kept, pointers, columns);
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

void transpose_bits(const BitRows& bits, uint64_t* transposed) {
  const int64_t words = (bits.rows + 63) / 64;
  for (int64_t column = 0; column < bits.width; column += 256) {
    const int64_t columns = bits.width - column < 256 ? bits.width - column : 256;
    for (int64_t word = 0; word < words; ++word) {
      FourWords tile[64];
      for (int64_t i = 0; i < 64; ++i) {
        const int64_t row = 64 * word + i;
        uint64_t parts[4] = {};
        for (int64_t part = 0; row < bits.rows && 64 * part < columns; ++part) {
          parts[part] = bits_at(bits, row * bits.stride + column + 64 * part);
        }
        std::memcpy(&tile[i], parts, sizeof(parts));
      }
      transpose_squares(tile);
      for (int64_t i = 0; i < columns; ++i) {
        transposed[(column + i) * words + word] = tile[i % 64][i / 64];
      }
    }
  }
}

}  // namespace tscnc::TSCNC_ISA
