#include "masked_optimizer.h"

#include "vec_loop.h"
#include "vec_math.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Kept entries that are gathered, stepped and scattered together. The lines of parameter and
// gradient of two such groups fill half of a 32 KB first-level cache.
constexpr int64_t kGathered = 64;
// One kept entry in so many leaves most lines of 16 floats with one.
constexpr int64_t kSparseRows = 8;

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
    for_vectors<T>(count, [&](int64_t i, auto memory) {
      const V p = memory.load(param + i);
      V g = memory.load(grad + i);
      if (maximize) g = -g;
      if (weight_decay != 0) g += weight_decay * p;
      if (state.first != nullptr) {
        V buffer = g;
        if (!first_step) buffer = momentum * memory.load(state.first + i) + fresh * g;
        memory.store(state.first + i, buffer);
        g = nesterov ? g + momentum * buffer : buffer;
      }
      memory.store(param + i, p - lr * g);
    });
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
    for_vectors<T>(count, [&](int64_t i, auto memory) {
      V p = memory.load(param + i), g = memory.load(grad + i);
      V m = memory.load(state.first + i), v = memory.load(state.second + i);
      if (maximize) g = -g;
      if (l2 != 0) g += l2 * p;
      p *= decay;
      m += fresh1 * (g - m);
      v = beta2 * v + fresh2 * g * g;
      memory.store(state.first + i, m);
      memory.store(state.second + i, v);
      if (state.max_second != nullptr) {
        const V before = memory.load(state.max_second + i);
        // A NaN stays, as in torch.maximum.
        v = v > before || v != v ? v : before;
        memory.store(state.max_second + i, v);
      }
      const V root = sqrt<S>(v) * inverse_root + eps;
      memory.store(param + i, p - step_size * (m / root));
    });
  }
};

// Gathers entries of parameter and gradient, steps them, and scatters the parameter.
template <class T, class Step, class Index>
void step_at(T* params, const T* grads, const Index* places, int64_t count, const Step& step,
             State<T> state) {
  T param[kGathered], grad[kGathered];
  for (int64_t i = 0; i < count; ++i) param[i] = params[places[i]];
  for (int64_t i = 0; i < count; ++i) grad[i] = grads[places[i]];
  step(param, grad, state, count);
  for (int64_t i = 0; i < count; ++i) params[places[i]] = param[i];
}

// Rows of which most cache lines hold a kept entry: the hardware fetches them ahead.
template <class T, class Step>
void run_full_rows(const StepTensor& tensor, const Step& step, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* const params = static_cast<T*>(tensor.param) + row * tensor.width;
    const T* const grads = static_cast<const T*>(tensor.grad) + row * tensor.width;
    const int64_t last = tensor.pointers[row + 1];
    for (int64_t j = tensor.pointers[row]; j < last; j += kGathered) {
      const int64_t count = last - j < kGathered ? last - j : kGathered;
      step_at(params, grads, tensor.columns + j, count, step, state_at<T>(tensor, j));
    }
  }
}

// Applies `step` to the kept entries of rows [begin, end). While one group of them is stepped, the
// lines of the next one are on their way.
template <class T, class Step>
void run_rows(const StepTensor& tensor, const Step& step, int64_t begin, int64_t end) {
  T* const params = static_cast<T*>(tensor.param);
  const T* const grads = static_cast<const T*>(tensor.grad);
  int64_t groups[2][kGathered];
  int64_t *coming = groups[0], *waiting = groups[1];
  int64_t count = 0, waits = 0, done = tensor.pointers[begin];
  const auto apply = [&](const int64_t* places, int64_t n) {
    step_at(params, grads, places, n, step, state_at<T>(tensor, done));
    done += n;
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * tensor.width;
    for (int64_t j = tensor.pointers[row]; j < tensor.pointers[row + 1]; ++j) {
      const int64_t place = start + tensor.columns[j];
      __builtin_prefetch(params + place, 1);
      __builtin_prefetch(grads + place);
      coming[count] = place;
      if (++count < kGathered) continue;
      apply(waiting, waits);
      int64_t* const full = coming;
      coming = waiting;
      waiting = full;
      waits = count;
      count = 0;
    }
  }
  apply(waiting, waits);
  apply(coming, count);
}

template <class T, class Step>
void run(const StepTensor& tensor, const Step& step, int64_t begin, int64_t end) {
  if (tensor.pointers != nullptr) {
    const int64_t kept = tensor.pointers[end] - tensor.pointers[begin];
    const bool full = kept * kSparseRows >= (end - begin) * tensor.width;
    return full ? run_full_rows<T>(tensor, step, begin, end)
                : run_rows<T>(tensor, step, begin, end);
  }
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
