#include "batch_norm_relu.h"

#include "batch_norm_formula.h"
#include "vec_loop.h"

namespace tscnc::TSCNC_ISA {
namespace {

// Entries whose sums are kept in the arithmetic type before they join the double ones.
constexpr int64_t kBlock = 4096;

// Calls visit(pointer offset, count) for the planes of a channel, in pieces of at most kBlock.
template <class Visit>
void for_pieces(BatchNormShape shape, int64_t channel, const Visit& visit) {
  for (int64_t n = 0; n < shape.outer; ++n) {
    const int64_t start = (n * shape.channels + channel) * shape.length;
    for (int64_t i = 0; i < shape.length; i += kBlock) {
      visit(start + i, shape.length - i < kBlock ? shape.length - i : kBlock);
    }
  }
}

// Two sums over many pieces: vectors until kBlock entries have come together, then doubles.
template <class T>
struct Accumulator {
  Vec<T> first[2] = {}, second[2] = {};
  int64_t count = 0;

  BatchNormSums take() {
    using S = Compute<T>;
    const BatchNormSums sums = {static_cast<double>(sum_lanes<S>(first[0] + first[1])),
                                static_cast<double>(sum_lanes<S>(second[0] + second[1]))};
    *this = {};
    return sums;
  }
};

// Adds terms(i, memory, lanes) -> pairs of vectors; two accumulators hide the additions' latency.
template <class T, class Terms>
void accumulate(Accumulator<T>& sums, int64_t count, const Terms& terms) {
  constexpr int64_t kN = kLanes<T>;
  int64_t i = 0;
  for (; i + 2 * kN <= count; i += 2 * kN) {
    terms(i, Whole<T>{}, sums.first[0], sums.second[0]);
    terms(i + kN, Whole<T>{}, sums.first[1], sums.second[1]);
  }
  if (i + kN <= count) {
    terms(i, Whole<T>{}, sums.first[0], sums.second[0]);
    i += kN;
  }
  if (i < count) terms(i, Rest<T>{count - i}, sums.first[1], sums.second[1]);
  sums.count += count;
}

// The mean of the first entries, about which those are summed up.
template <class T>
double first_shift(const T* input, BatchNormShape shape, int64_t channel) {
  using S = Compute<T>;
  double sum = 0;
  int64_t seen = 0;
  for (int64_t n = 0; n < shape.outer && seen < kBlock; ++n) {
    const T* plane = input + (n * shape.channels + channel) * shape.length;
    const int64_t count = shape.length < kBlock ? shape.length : kBlock;
    Vec<T> total = {};
    for_vectors<T>(count, [&](int64_t i, auto memory) { total += memory.load(plane + i); });
    sum += static_cast<double>(sum_lanes<S>(total));
    seen += count;
  }
  return sum / static_cast<double>(seen);
}

}  // namespace

template <class T>
BatchNormSums batch_norm_plane_statistics(const T* input, BatchNormShape shape, int64_t channel) {
  using S = Compute<T>;
  BatchNormSums total = {first_shift(input, shape, channel), 0};
  S shift = static_cast<S>(total.first);
  double before = 0;
  Accumulator<T> sums;
  const auto flush = [&] {
    const double count = static_cast<double>(sums.count);
    const BatchNormSums found = sums.take();
    join(total, before, count, static_cast<double>(shift), found.first, found.second);
    before += count;
    shift = static_cast<S>(total.first);
  };
  for_pieces(shape, channel, [&](int64_t start, int64_t count) {
    const T* x = input + start;
    accumulate(sums, count, [&](int64_t i, auto memory, Vec<T>& first, Vec<T>& second) {
      const Vec<T> deviation = memory.masked(memory.load(x + i) - shift);
      first += deviation;
      second += deviation * deviation;
    });
    if (sums.count >= kBlock) flush();
  });
  if (sums.count > 0) flush();
  return total;
}

template <class T>
void batch_norm_plane_output(const T* input, T* output, BatchNormShape shape, int64_t channel,
                             const BatchNormChannel& how) {
  const Formula<Vec<T>> f = vectors<T>(how);
  const auto run = [&](auto relu) {
    for_pieces(shape, channel, [&](int64_t start, int64_t count) {
      for_vectors<T>(count, [&](int64_t i, auto memory) {
        const Vec<T> x = memory.load(input + start + i);
        memory.store(output + start + i, f.template output<decltype(relu)::value>(x));
      });
    });
  };
  with_flag(how.relu, run);
}

template <class T>
BatchNormSums batch_norm_plane_sums(const T* grad_output, const T* input, BatchNormShape shape,
                                    int64_t channel, const BatchNormChannel& how) {
  using S = Compute<T>;
  const Formula<Vec<T>> f = vectors<T>(how);
  BatchNormSums total = {};
  Accumulator<T> sums;
  const auto flush = [&] {
    const BatchNormSums found = sums.take();
    total.first += found.first;
    total.second += found.second;
  };
  const auto run = [&](auto relu) {
    for_pieces(shape, channel, [&](int64_t start, int64_t count) {
      const T* x = input + start;
      const T* g = grad_output + start;
      accumulate(sums, count, [&](int64_t i, auto memory, Vec<T>& first, Vec<T>& second) {
        const Vec<T> deviation = memory.load(x + i) - f.center;
        const Vec<T> passed =
            f.template through<decltype(relu)::value>(memory.load(g + i), deviation);
        first += passed;
        second += passed * deviation;
      });
      if (sums.count >= kBlock) flush();
    });
  };
  with_flag(how.relu, run);
  flush();
  return {total.first, total.second - rest_of_mean<S>(how) * total.first};
}

template <class T>
void batch_norm_plane_gradient(const T* grad_output, const T* input, T* grad_input,
                               BatchNormShape shape, int64_t channel, const BatchNormChannel& how) {
  const Formula<Vec<T>> f = vectors<T>(how);
  const auto run = [&](auto relu) {
    for_pieces(shape, channel, [&](int64_t start, int64_t count) {
      for_vectors<T>(count, [&](int64_t i, auto memory) {
        const Vec<T> deviation = memory.load(input + start + i) - f.center;
        const Vec<T> g = memory.load(grad_output + start + i);
        const Vec<T> passed = f.template through<decltype(relu)::value>(g, deviation);
        memory.store(grad_input + start + i, f.input(passed, deviation));
      });
    });
  };
  with_flag(how.relu, run);
}

#define TSCNC_INSTANTIATE(T)                                                                   \
  template BatchNormSums batch_norm_plane_statistics<T>(const T*, BatchNormShape, int64_t);    \
  template void batch_norm_plane_output<T>(const T*, T*, BatchNormShape, int64_t,              \
                                           const BatchNormChannel&);                           \
  template BatchNormSums batch_norm_plane_sums<T>(const T*, const T*, BatchNormShape, int64_t, \
                                                  const BatchNormChannel&);                    \
  template void batch_norm_plane_gradient<T>(const T*, const T*, T*, BatchNormShape, int64_t,  \
                                             const BatchNormChannel&);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)
TSCNC_INSTANTIATE(bf16)
TSCNC_INSTANTIATE(fp16)

}  // namespace tscnc::TSCNC_ISA
