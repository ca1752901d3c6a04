// The entries that a packed mask keeps.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tscnc {

// target[i] = source[i] where bit i % 8 of byte i / 8 is set, else zero, whatever the source holds
// there; for the entries of bytes [begin, end) as far as there are `count`. U has the size of an
// entry. Source and target may be the same.
TSCNC_PER_ISA(template <class U> void mask_entries(const U* source, const uint8_t* bits,
                                                   int64_t begin, int64_t end, int64_t count,
                                                   U* target);)

}  // namespace tscnc
