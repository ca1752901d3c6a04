// 16-bit storage formats on the host: plain bits, converted to float for arithmetic.
#pragma once

#include <cstdint>

namespace tscnc {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

}  // namespace tscnc
