// exp and log of whole vectors, float and double, within about 2 ulp; the exact square root.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "vec.h"

namespace tscnc::TSCNC_ISA {

template <class S>
struct FloatLayout;

template <>
struct FloatLayout<float> {
  using Bits = int32_t;
  using UnsignedBits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float kMinExp = -87.3f, kMaxExp = 88.3f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int kExpTerms = 7, kLogTerms = 5;
};

template <>
struct FloatLayout<double> {
  using Bits = int64_t;
  using UnsignedBits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kMinExp = -708.3, kMaxExp = 709.4;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr int kExpTerms = 13, kLogTerms = 11;
};

template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// A loop over the lanes, of which the compiler makes one instruction.
template <class S>
inline Vec<S> sqrt(Vec<S> x) {
  S lanes[kLanes<S>];
  store(lanes, x);
  for (S& lane : lanes) {
    if constexpr (sizeof(S) == sizeof(float)) {
      lane = __builtin_sqrtf(lane);
    } else {
      lane = __builtin_sqrt(lane);
    }
  }
  return load(lanes);
}

// exp(x + low), |low| < 0.06, with the digits of x + low that a rounded sum would lose. Arguments
// beyond the range of normal results give the smallest or largest one; NaN stays NaN.
template <class S>
inline Vec<S> exp(Vec<S> x, Vec<S> low) {
  using Layout = FloatLayout<S>;
  using BitVec = Vec<typename Layout::UnsignedBits>;
  x = x < Layout::kMinExp ? broadcast(Layout::kMinExp) : x;
  x = x > Layout::kMaxExp ? broadcast(Layout::kMaxExp) : x;
  const Vec<S> rounded = x * S(0x1.71547652b82fep0) + Layout::kRound;
  const Vec<S> power = rounded - Layout::kRound;
  const Vec<S> rest = (x - power * Layout::kLn2High) - power * Layout::kLn2Low + low;
  Vec<S> sum = broadcast(S(1));
  // Taylor's polynomial by Horner: |rest| <= ln(2) / 2 + |low|, so the next term is below half an
  // ulp.
#pragma GCC unroll 16
  for (int k = Layout::kExpTerms; k > 0; --k) sum = S(1) + rest * (S(1) / S(k)) * sum;
  const BitVec exponent = bit_cast<BitVec>(rounded) - bit_cast<BitVec>(broadcast(Layout::kRound));
  return sum * bit_cast<Vec<S>>((exponent + Layout::kBias) << Layout::kMantissaBits);
}

template <class S>
inline Vec<S> exp(Vec<S> x) {
  return exp<S>(x, Vec<S>{});
}

// log(0) = -inf, log(inf) = inf, negative or NaN gives NaN. A subnormal argument counts as zero.
template <class S>
inline Vec<S> log(Vec<S> x) {
  using Layout = FloatLayout<S>;
  using BitVec = Vec<typename Layout::UnsignedBits>;
  using SignedVec = Vec<typename Layout::Bits>;
  const BitVec half_root = bit_cast<BitVec>(broadcast(S(0x1.6a09e667f3bcdp-1)));
  // x = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const BitVec bits = bit_cast<BitVec>(x);
  const SignedVec exponent = bit_cast<SignedVec>(bits - half_root) >> Layout::kMantissaBits;
  const Vec<S> mantissa =
      bit_cast<Vec<S>>(bits - (bit_cast<BitVec>(exponent) << Layout::kMantissaBits));
  const Vec<S> t = (mantissa - S(1)) / (mantissa + S(1));
  const Vec<S> square = t * t;
  // log(mantissa) = 2 atanh(t), |t| < 0.172.
  Vec<S> sum = Vec<S>{};
#pragma GCC unroll 16
  for (int k = Layout::kLogTerms - 1; k > 0; --k) sum = square * (S(1) / S(2 * k + 1) + sum);
  const Vec<S> power = __builtin_convertvector(exponent, Vec<S>);
  Vec<S> result =
      power * Layout::kLn2High + (S(2) * t + (S(2) * t * sum + power * Layout::kLn2Low));
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  result = x == kInfinity ? x : result;
  result = x < std::numeric_limits<S>::min() ? broadcast(-kInfinity) : result;
  result = x < S(0) ? broadcast(std::numeric_limits<S>::quiet_NaN()) : result;
  return x == x ? result : x;
}

}  // namespace tscnc::TSCNC_ISA
