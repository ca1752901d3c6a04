#include "masked_optimizer.h"

#include "vec.h"
#include "vec_math.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Kept entries that are gathered, stepped and scattered together. Their lines of parameter and
// gradient, prefetched, fill half of a 32 KB first-level cache.
constexpr int64_t kGathered = 128;

// The state of one tensor, from its entry `offset` on.
template <class T>
struct State {
  T* first;
  T* second;
  T* max_second;
};

template <class T>
State<T> state_at(const StepTensor& tensor, int64_t offset) {
  const auto at = [&](void* data) {
    return data == nullptr ? nullptr : static_cast<T*>(data) + offset;
  };
  return {at(tensor.first), at(tensor.second), at(tensor.max_second)};
}

template <class T>
Vec<T> load_some(const T* source, int64_t count) {
  return count >= kLanes<T> ? load(source) : load_partial(source, count);
}

template <class T>
void store_some(T* target, Vec<T> value, int64_t count) {
  count >= kLanes<T> ? store(target, value) : store_partial(target, value, count);
}

template <class T>
struct Sgd {
  using S = Compute<T>;
  using V = Vec<T>;
  S lr, momentum, fresh, weight_decay;
  bool nesterov, maximize, first_step;

  explicit Sgd(const SgdOptions& o)
      : lr(static_cast<S>(o.lr)),
        momentum(static_cast<S>(o.momentum)),
        fresh(static_cast<S>(1 - o.dampening)),
        weight_decay(static_cast<S>(o.weight_decay)),
        nesterov(o.nesterov),
        maximize(o.maximize),
        first_step(o.first_step) {}

  void operator()(T* param, const T* grad, State<T> state, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t left = count - i;
      const V p = load_some(param + i, left);
      V g = load_some(grad + i, left);
      if (maximize) g = -g;
      if (weight_decay != 0) g += weight_decay * p;
      if (state.first != nullptr) {
        const V buffer = first_step ? g : momentum * load_some(state.first + i, left) + fresh * g;
        store_some(state.first + i, buffer, left);
        g = nesterov ? g + momentum * buffer : buffer;
      }
      store_some(param + i, V(p - lr * g), left);
    }
  }
};

template <class T>
struct Adamw {
  using S = Compute<T>;
  using V = Vec<T>;
  S fresh1, beta2, fresh2, eps, step_size, inverse_root, decay, l2;
  bool maximize;

  explicit Adamw(const AdamwOptions& o)
      : fresh1(static_cast<S>(1 - o.beta1)),
        beta2(static_cast<S>(o.beta2)),
        fresh2(static_cast<S>(1 - o.beta2)),
        eps(static_cast<S>(o.eps)),
        step_size(static_cast<S>(o.step_size)),
        inverse_root(static_cast<S>(o.inverse_root)),
        decay(static_cast<S>(o.decay)),
        l2(static_cast<S>(o.l2)),
        maximize(o.maximize) {}

  void operator()(T* param, const T* grad, State<T> state, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t left = count - i;
      V p = load_some(param + i, left), g = load_some(grad + i, left);
      V m = load_some(state.first + i, left), v = load_some(state.second + i, left);
      if (maximize) g = -g;
      if (l2 != 0) g += l2 * p;
      p *= decay;
      m += fresh1 * (g - m);
      v = beta2 * v + fresh2 * g * g;
      store_some(state.first + i, m, left);
      store_some(state.second + i, v, left);
      if (state.max_second != nullptr) {
        const V before = load_some(state.max_second + i, left);
        // A NaN stays, as in torch.maximum.
        v = v > before || v != v ? v : before;
        store_some(state.max_second + i, v, left);
      }
      const V root = sqrt<S>(v) * inverse_root + eps;
      store_some(param + i, V(p - step_size * (m / root)), left);
    }
  }
};

// Applies `step` to the kept entries of rows [begin, end).
template <class T, class Step>
void run_rows(const StepTensor& tensor, const Step& step, int64_t begin, int64_t end) {
  T* const params = static_cast<T*>(tensor.param);
  const T* const grads = static_cast<const T*>(tensor.grad);
  int64_t positions[kGathered];
  T param[kGathered], grad[kGathered];
  int64_t count = 0, done = tensor.pointers[begin];
  const auto flush = [&] {
    for (int64_t i = 0; i < count; ++i) param[i] = params[positions[i]];
    for (int64_t i = 0; i < count; ++i) grad[i] = grads[positions[i]];
    step(param, grad, state_at<T>(tensor, done), count);
    for (int64_t i = 0; i < count; ++i) params[positions[i]] = param[i];
    done += count;
    count = 0;
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * tensor.width;
    for (int64_t j = tensor.pointers[row]; j < tensor.pointers[row + 1]; ++j) {
      const int64_t position = start + tensor.columns[j];
      __builtin_prefetch(params + position, 1);
      __builtin_prefetch(grads + position);
      positions[count] = position;
      if (++count == kGathered) flush();
    }
  }
  flush();
}

template <class T, class Step>
void run(const StepTensor& tensor, const Step& step, int64_t begin, int64_t end) {
  if (tensor.pointers != nullptr) return run_rows<T>(tensor, step, begin, end);
  step(static_cast<T*>(tensor.param) + begin, static_cast<const T*>(tensor.grad) + begin,
       state_at<T>(tensor, begin), end - begin);
}

}  // namespace

template <class T>
void masked_sgd_step(const StepTensor& tensor, const SgdOptions& options, int64_t begin,
                     int64_t end) {
  run<T>(tensor, Sgd<T>(options), begin, end);
}

template <class T>
void masked_adamw_step(const StepTensor& tensor, const AdamwOptions& options, int64_t begin,
                       int64_t end) {
  run<T>(tensor, Adamw<T>(options), begin, end);
}

#define TSCNC_INSTANTIATE(T)                                                                \
  template void masked_sgd_step<T>(const StepTensor&, const SgdOptions&, int64_t, int64_t); \
  template void masked_adamw_step<T>(const StepTensor&, const AdamwOptions&, int64_t, int64_t);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
