#include "hard_concrete.h"

#include <cmath>

#include "../include/hard_concrete.h"
#include "elementwise.cuh"

namespace tscnc::cuda {

namespace {

template <typename S>
__device__ __forceinline__ S exponential_of(S x) {
  using std::exp;
  return exp(x < 0 ? x : -x);
}

template <typename S>
__device__ __forceinline__ S log_odds_of(S uniform) {
  using std::log;
  return log((S(1) - uniform) / uniform);
}

// The gate of (log_alpha, uniform), or of log_alpha alone.
template <typename S, bool kNoisy>
struct Gate {
  S inverse_beta, gamma, zeta;

  explicit Gate(const GateCall& call)
      : inverse_beta(kNoisy ? S(1 / call.beta) : S(1)), gamma(S(call.gamma)), zeta(S(call.zeta)) {}

  __device__ __forceinline__ S argument(const S* values) const {
    S log_odds = 0;
    if constexpr (kNoisy) log_odds = log_odds_of(values[1]);
    return hard_concrete_argument(values[0], log_odds, inverse_beta);
  }

  template <int kInputs>
  __device__ __forceinline__ S operator()(const S (&values)[kInputs]) const {
    const S x = argument(values);
    return hard_concrete_clip(hard_concrete_stretched(x, exponential_of(x), gamma, zeta));
  }
};

// The gradient of that gate; the gradient of the output is the last input.
template <typename S, bool kNoisy>
struct GateGradient {
  Gate<S, kNoisy> gate;

  template <int kInputs>
  __device__ __forceinline__ S operator()(const S (&values)[kInputs]) const {
    const S x = gate.argument(values);
    const S e = exponential_of(x);
    const S stretched = hard_concrete_stretched(x, e, gate.gamma, gate.zeta);
    const S slope = (gate.zeta - gate.gamma) * gate.inverse_beta;
    return values[kInputs - 1] * hard_concrete_derivative(stretched, e, slope);
  }
};

template <typename Storage>
const Storage* as(const void* pointer) {
  return static_cast<const Storage*>(pointer);
}

}  // namespace

cudaError_t launch_hard_concrete(const GateCall& call, void* gates, cudaStream_t stream) {
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using S = Math<Storage>;
    const Storage* log_alpha = as<Storage>(call.log_alpha);
    auto* output = static_cast<Storage*>(gates);
    if (call.uniform == nullptr) {
      const MapArrays<Storage, 1> arrays = {{log_alpha}, output, call.count};
      return launch_map(arrays, Gate<S, false>(call), stream);
    }
    const MapArrays<Storage, 2> arrays = {
        {log_alpha, as<Storage>(call.uniform)}, output, call.count};
    return launch_map(arrays, Gate<S, true>(call), stream);
  });
}

cudaError_t launch_hard_concrete_backward(const GateCall& call, const void* grad_output,
                                          void* gradient, cudaStream_t stream) {
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using S = Math<Storage>;
    const Storage* log_alpha = as<Storage>(call.log_alpha);
    const Storage* scale = as<Storage>(grad_output);
    auto* output = static_cast<Storage*>(gradient);
    if (call.uniform == nullptr) {
      const MapArrays<Storage, 2> arrays = {{log_alpha, scale}, output, call.count};
      return launch_map(arrays, GateGradient<S, false>{Gate<S, false>(call)}, stream);
    }
    const MapArrays<Storage, 3> arrays = {
        {log_alpha, as<Storage>(call.uniform), scale}, output, call.count};
    return launch_map(arrays, GateGradient<S, true>{Gate<S, true>(call)}, stream);
  });
}

}  // namespace tscnc::cuda
