#include "mask_entries.h"

#include <cstring>

namespace tscnc::TSCNC_ISA {

// One byte of the mask at a time, without a branch: the bits of a random mask cannot be predicted.
template <class U>
void mask_entries(const U* source, const uint8_t* bits, int64_t begin, int64_t end, int64_t count,
                  U* target) {
  typedef U Entries __attribute__((vector_size(8 * sizeof(U))));
  const Entries places = {1, 2, 4, 8, 16, 32, 64, 128};
  const int64_t whole = count / 8 < end ? count / 8 : end;
  for (int64_t byte = begin; byte < whole; ++byte) {
    Entries entries;
    std::memcpy(&entries, source + 8 * byte, sizeof(entries));
    entries &= ((places & static_cast<U>(bits[byte])) == places);
    std::memcpy(target + 8 * byte, &entries, sizeof(entries));
  }
  const int64_t last = count < 8 * end ? count : 8 * end;
  for (int64_t i = 8 * (whole > begin ? whole : begin); i < last; ++i) {
    target[i] = bits[i / 8] >> (i % 8) & 1 ? source[i] : U{0};
  }
}

#define TSCNC_INSTANTIATE(U) \
  template void mask_entries<U>(const U*, const uint8_t*, int64_t, int64_t, int64_t, U*);
TSCNC_INSTANTIATE(uint16_t)
TSCNC_INSTANTIATE(uint32_t)
TSCNC_INSTANTIATE(uint64_t)

}  // namespace tscnc::TSCNC_ISA
