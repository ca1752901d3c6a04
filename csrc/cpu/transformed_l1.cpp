#include "transformed_l1.h"

#include "include/transformed_l1.h"
#include "vec.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Elements summed in the arithmetic type before they join the double sum.
constexpr int64_t kBlock = 512;

template <bool kValue, bool kGradient, class T>
double run(const T* input, T* gradient, int64_t count, double a_, double scale_) {
  using C = Compute<T>;
  constexpr int64_t kN = kLanes<T>;
  const C a = static_cast<C>(a_), scale = static_cast<C>(scale_);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    Vec<T> sum = {};
    int64_t i = begin;
    for (; i + kN <= end; i += kN) {
      const Vec<T> t = load(input + i);
      if (kValue) sum += transformed_l1_value(t, a);
      if (kGradient) store(gradient + i, scale * transformed_l1_gradient(t, a));
    }
    if (i < end) {
      const Vec<T> t = load_partial(input + i, end - i);
      if (kValue) sum += transformed_l1_value(t, a);
      if (kGradient) store_partial(gradient + i, scale * transformed_l1_gradient(t, a), end - i);
    }
    total += sum_lanes<C>(sum);
  }
  return total;
}

}  // namespace

template <class T>
double transformed_l1(const T* input, T* gradient, int64_t count, double a, double scale,
                      bool want_value) {
  if (gradient == nullptr) return run<true, false>(input, gradient, count, a, scale);
  if (want_value) return run<true, true>(input, gradient, count, a, scale);
  return run<false, true>(input, gradient, count, a, scale);
}

#define TSCNC_INSTANTIATE(T) \
  template double transformed_l1<T>(const T*, T*, int64_t, double, double, bool);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
