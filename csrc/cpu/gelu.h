// gelu(z) = z Phi(z) of whole vectors and its derivative, accurate relative to the result, also
// where Phi is small: float within 5e-7, double within 1e-15 of z Phi(z) wherever that is no
// subnormal.
//
// Phi(-a) = exp(-a^2 / 2) r(a) for a >= 0, with r(a) (a + 4) a polynomial in t = (a - 4) / (a + 4).
// Source: the substitution is Schonfelder's, "Chebyshev expansions for the error and related
// functions" (1978); the polynomials interpolate r(a) (a + 4) at Chebyshev nodes between t = -1 and
// where exp underflows, computed with 60 digits.
#pragma once

#include "vec_math.h"

namespace tscnc::TSCNC_ISA {

template <class S>
struct GeluTable;

template <>
struct GeluTable<float> {
  static constexpr int kTerms = 10;
  static constexpr float kCoefficients[kTerms] = {
      0x1.82b4bcp-1f,  -0x1.373e3ap-1f, 0x1.8c6d8cp-2f,  -0x1.7dffa6p-3f, 0x1.eedaa4p-5f,
      -0x1.ed6108p-8f, -0x1.ce3166p-9f, 0x1.9ba3d8p-10f, 0x1.a1bd5ap-13f, -0x1.fac3c4p-14f};
  static constexpr float kEnd = 13.2f;           // exp(-a^2 / 2) is subnormal from a little above
  static constexpr uint32_t kHead = 0xfffff000;  // bits of a number whose square is exact
};

template <>
struct GeluTable<double> {
  static constexpr int kTerms = 22;
  static constexpr double kCoefficients[kTerms] = {
      0x1.82b4bb8c94dcep-1,  -0x1.373e3a893c27ep-1,  0x1.8c6dbf2cfc244p-2,   -0x1.7dff2bff696aep-3,
      0x1.eec4cc3e569b3p-5,  -0x1.ee2760ffffb1ap-8,  -0x1.c81719de374cp-9,   0x1.ab825ec63eb96p-10,
      0x1.17a4b19a12bf5p-13, -0x1.e4a3e91cc2c61p-13, -0x1.001f2e99a6988p-19, 0x1.26cc3b3d8bbdp-15,
      0x1.807218610a74cp-21, -0x1.8ce603de4ba48p-18, -0x1.506f163f35569p-21, 0x1.0f5e8efc415a2p-20,
      0x1.1b8e33652b6d4p-22, -0x1.34ccc644580bbp-23, -0x1.40284f28032b2p-24, 0x1.06533f8fe8f5cp-27,
      0x1.8b1901f27a31cp-27, 0x1.1a60d00a4a2aep-29};
  static constexpr double kEnd = 37.6;
  static constexpr uint64_t kHead = 0xfffffffff8000000;
};

// Of the standard normal distribution: exp(-z^2 / 2) and Phi(z).
template <class S>
struct Normal {
  Vec<S> exponential, distribution;
};

template <class S>
inline Normal<S> normal(Vec<S> z) {
  using Table = GeluTable<S>;
  using BitVec = Vec<typename FloatLayout<S>::UnsignedBits>;
  const Vec<S> a = abs(z);
  // a^2 = head^2 + (a - head) (a + head): rounding a^2 would cost a^2 / 2 ulp of the exponential.
  const Vec<S> head = bit_cast<Vec<S>>(bit_cast<BitVec>(a) & Table::kHead);
  Vec<S> exponential = exp<S>(S(-0.5) * head * head, S(-0.5) * (a - head) * (a + head));
  exponential = a > Table::kEnd ? Vec<S>{} : exponential;
  const Vec<S> scale = S(1) / (a + S(4));
  const Vec<S> t = (a - S(4)) * scale;
  Vec<S> sum = broadcast(Table::kCoefficients[Table::kTerms - 1]);
#pragma GCC unroll 32
  for (int k = Table::kTerms - 2; k >= 0; --k) sum = Table::kCoefficients[k] + t * sum;
  const Vec<S> tail = a > Table::kEnd ? Vec<S>{} : exponential * (sum * scale);
  return {exponential, z < 0 ? tail : S(1) - tail};
}

// Not inlined: transpositions unroll the calls, each of which is some sixty instructions.
#define TSCNC_ONE_COPY __attribute__((noinline))

// z Phi(z).
template <class S>
TSCNC_ONE_COPY Vec<S> gelu(Vec<S> z) {
  return z * normal<S>(z).distribution;
}

// Phi(z) + z phi(z).
template <class S>
TSCNC_ONE_COPY Vec<S> gelu_gradient(Vec<S> z) {
  const Normal<S> at = normal<S>(z);
  return at.distribution + z * (S(0.39894228040143267794) * at.exponential);
}

#undef TSCNC_ONE_COPY

}  // namespace tscnc::TSCNC_ISA
