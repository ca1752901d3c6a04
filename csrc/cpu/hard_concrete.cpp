#include "hard_concrete.h"

#include "include/hard_concrete.h"
#include "vec.h"
#include "vec_math.h"

namespace tscnc::TSCNC_ISA {
namespace {

// One vector of gates, from what the sigmoid is taken of.
template <class S>
struct Gate {
  Vec<S> exponential;  // exp(-|x|)
  Vec<S> stretched;
};

template <class S>
Gate<S> gate(Vec<S> log_alpha, Vec<S> log_odds, S inverse_beta, S gamma, S zeta) {
  const Vec<S> x = hard_concrete_argument(log_alpha, log_odds, inverse_beta);
  const Vec<S> e = exp<S>(-abs(x));
  return {e, hard_concrete_stretched(x, e, gamma, zeta)};
}

// log((1 - u) / u)
template <class S>
Vec<S> log_odds_of(Vec<S> uniform) {
  return log<S>((S(1) - uniform) / uniform);
}

}  // namespace

template <class T>
void hard_concrete(const T* log_alpha, const T* uniform, T* gates, int64_t count, double beta,
                   double gamma, double zeta) {
  using S = Compute<T>;
  constexpr int64_t kN = kLanes<T>;
  const S low = static_cast<S>(gamma), high = static_cast<S>(zeta);
  const S inverse_beta = uniform == nullptr ? S(1) : static_cast<S>(1 / beta);
  for (int64_t i = 0; i < count; i += kN) {
    const bool whole = i + kN <= count;
    const Vec<S> a = whole ? load(log_alpha + i) : load_partial(log_alpha + i, count - i);
    Vec<S> odds = {};
    if (uniform != nullptr) {
      odds = log_odds_of<S>(whole ? load(uniform + i) : load_partial(uniform + i, count - i));
    }
    const Vec<S> z = hard_concrete_clip(gate<S>(a, odds, inverse_beta, low, high).stretched);
    whole ? store(gates + i, z) : store_partial(gates + i, z, count - i);
  }
}

template <class T>
void hard_concrete_backward(const T* grad_output, const T* log_alpha, const T* uniform, T* gradient,
                            int64_t count, double beta, double gamma, double zeta) {
  using S = Compute<T>;
  constexpr int64_t kN = kLanes<T>;
  const S low = static_cast<S>(gamma), high = static_cast<S>(zeta);
  const S inverse_beta = uniform == nullptr ? S(1) : static_cast<S>(1 / beta);
  const S slope = (high - low) * inverse_beta;
  for (int64_t i = 0; i < count; i += kN) {
    const bool whole = i + kN <= count;
    const Vec<S> a = whole ? load(log_alpha + i) : load_partial(log_alpha + i, count - i);
    const Vec<S> g = whole ? load(grad_output + i) : load_partial(grad_output + i, count - i);
    Vec<S> odds = {};
    if (uniform != nullptr) {
      odds = log_odds_of<S>(whole ? load(uniform + i) : load_partial(uniform + i, count - i));
    }
    const Gate<S> z = gate<S>(a, odds, inverse_beta, low, high);
    const Vec<S> result = g * hard_concrete_derivative(z.stretched, z.exponential, slope);
    whole ? store(gradient + i, result) : store_partial(gradient + i, result, count - i);
  }
}

#define TSCNC_INSTANTIATE(T)                                                                 \
  template void hard_concrete<T>(const T*, const T*, T*, int64_t, double, double, double);   \
  template void hard_concrete_backward<T>(const T*, const T*, const T*, T*, int64_t, double, \
                                          double, double);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
