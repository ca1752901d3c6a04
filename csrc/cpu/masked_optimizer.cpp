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
  using V = Vec<T>;
  SgdFormula<Compute<T>> formula;

  explicit Sgd(const SgdOptions& options) : formula(options) {}

  void operator()(T* param, const T* grad, State<T> state, int64_t count) const {
    for_vectors<T>(count, [&](int64_t i, auto memory) {
      const V p = memory.load(param + i);
      V g = formula.gradient(p, memory.load(grad + i));
      if (state.first != nullptr) {
        V buffer = g;
        if (!formula.first_step) buffer = formula.buffer(g, memory.load(state.first + i));
        memory.store(state.first + i, buffer);
        g = formula.direction(g, buffer);
      }
      memory.store(param + i, p - formula.lr * g);
    });
  }
};

template <class T>
struct Adamw {
  using V = Vec<T>;
  AdamwFormula<Compute<T>> formula;

  explicit Adamw(const AdamwOptions& options) : formula(options) {}

  void operator()(T* param, const T* grad, State<T> state, int64_t count) const {
    for_vectors<T>(count, [&](int64_t i, auto memory) {
      const V p = memory.load(param + i);
      const V g = formula.gradient(p, memory.load(grad + i));
      const V m = formula.first_moment(g, memory.load(state.first + i));
      V v = formula.second_moment(g, memory.load(state.second + i));
      memory.store(state.first + i, m);
      memory.store(state.second + i, v);
      if (state.max_second != nullptr) {
        v = formula.larger(v, memory.load(state.max_second + i));
        memory.store(state.max_second + i, v);
      }
      memory.store(param + i, formula.stepped(p, m, sqrt<Compute<T>>(v)));
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
