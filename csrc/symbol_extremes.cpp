// The search for the extreme symbols of a convolution; Python side and formula:
// tscnc_kernels/_symbol_search.py.
#include "cpu/symbol_extremes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "scratch.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "symbol_extremes";

// Frequencies of one group that a thread takes at a time: whole vectors of every instruction set.
constexpr int64_t kTask = 16;

const double* doubles(const Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == dims && tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous(),
      kOp, ": expected ", name, " to be contiguous float64 of ", dims, " dimensions");
  return static_cast<const double*>(tensor.const_data_ptr());
}

using Places = std::vector<int64_t>;

// The symbols of all groups and frequencies; a place is a flat index among groups x frequencies.
class Symbols {
 public:
  Symbols(const Tensor& terms, const Tensor& waves, int64_t n)
      : terms_(doubles(terms, 5, "terms")),
        cosines_(doubles(waves, 3, "waves")),
        n_(n),
        shifts_(terms.size(2)),
        frequencies_(waves.size(1)),
        group_size_(terms.size(1) * shifts_ * 2 * kTermElements),
        places_(terms.size(0) * frequencies_) {
    STD_TORCH_CHECK(n > 0 && terms.size(1) == term_blocks(n) && terms.size(3) == 2 &&
                        terms.size(4) == kTermElements && waves.size(0) == 2 &&
                        waves.size(2) == shifts_,
                    kOp, ": expected what gram_terms returns and (2, frequencies, shifts) waves");
  }

  int64_t places() const { return places_; }

  // Signed square roots of the extreme eigenvalues: the largest of all places, then the smallest.
  std::vector<double> extremes(const Places& places) const {
    const size_t count = places.size();
    std::vector<double> found(2 * count), result(2 * count);
    const auto kernel = TSCNC_SELECT(symbol_extremes);
    const Places order = run(places, [&](const GramTerms& gram, const Places& chosen,
                                         const Task& task, double* scratch) {
      kernel(gram, chosen.data() + task.begin, task.end - task.begin, found.data() + task.begin,
             found.data() + count + static_cast<size_t>(task.begin), scratch);
    });
    const auto root = [](double x) { return x < 0 ? -std::sqrt(-x) : std::sqrt(x); };
    for (size_t i = 0; i < count; ++i) {
      const size_t target = static_cast<size_t>(order[i]);
      result[target] = root(found[i]);
      result[count + target] = root(found[count + i]);
    }
    return result;
  }

  // Whether the smallest singular value at each place is proven to be at least its level.
  std::vector<bool> proven(const Places& places, const std::vector<double>& levels) const {
    std::vector<double> squares(places.size());
    std::vector<unsigned char> found(places.size());
    const auto kernel = TSCNC_SELECT(symbol_floors);
    const Places order = sorted(places);
    for (size_t i = 0; i < places.size(); ++i) {
      const double level = levels[static_cast<size_t>(order[i])];
      squares[i] = level * level;
    }
    run(places,
        [&](const GramTerms& gram, const Places& chosen, const Task& task, double* scratch) {
          kernel(gram, chosen.data() + task.begin, squares.data() + task.begin,
                 task.end - task.begin, found.data() + task.begin, scratch);
        });
    std::vector<bool> result(places.size());
    for (size_t i = 0; i < found.size(); ++i) result[static_cast<size_t>(order[i])] = found[i] != 0;
    return result;
  }

 private:
  struct Task {
    int64_t group, begin, end;  // of the sorted places
  };

  static Places sorted(const Places& places) {
    Places order(places.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return places[static_cast<size_t>(a)] < places[static_cast<size_t>(b)];
    });
    return order;
  }

  // Calls body(terms of the group, frequencies of the sorted places, task, workspace) on torch's
  // threads and returns the order.
  template <class Body>
  Places run(const Places& places, const Body& body) const {
    const Places order = sorted(places);
    Places chosen;
    std::vector<Task> tasks;
    for (const int64_t index : order) {
      const int64_t place = places[static_cast<size_t>(index)], group = place / frequencies_;
      const int64_t here = static_cast<int64_t>(chosen.size());
      if (tasks.empty() || tasks.back().group != group || here - tasks.back().begin == kTask) {
        tasks.push_back({group, here, here});
      }
      tasks.back().end = here + 1;
      chosen.push_back(place % frequencies_);
    }
    const int64_t workspace = TSCNC_SELECT(symbol_extremes_workspace)(n_, shifts_);
    const auto work = [&](int64_t begin, int64_t end) {
      double* scratch = thread_scratch().reserve<double>(workspace);
      for (int64_t i = begin; i < end; ++i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        body(GramTerms{terms_ + task.group * group_size_, cosines_,
                       cosines_ + frequencies_ * shifts_, n_, shifts_},
             chosen, task, scratch);
      }
    };
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, work);
    return order;
  }

  const double *terms_, *cosines_;
  int64_t n_, shifts_, frequencies_, group_size_, places_;
};

// (2, k) largest and smallest singular values at (k,) places, of squares below 0 their negative.
Tensor symbol_extremes_cpu(Tensor terms, Tensor waves, Tensor places, int64_t n) {
  const Symbols symbols(terms, waves, n);
  STD_TORCH_CHECK(
      places.dim() == 1 && places.scalar_type() == ScalarType::Long && places.is_contiguous(), kOp,
      ": expected places to be contiguous int64 of one dimension");
  const int64_t* place = static_cast<const int64_t*>(places.const_data_ptr());
  const Places chosen(place, place + places.numel());
  for (const int64_t at : chosen) {
    STD_TORCH_CHECK(at >= 0 && at < symbols.places(), kOp, ": place ", at, " is not one of ",
                    symbols.places());
  }
  const std::vector<double> found = symbols.extremes(chosen);
  Tensor result = torch::stable::empty({2, places.numel()}, ScalarType::Double);
  std::copy(found.begin(), found.end(), static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

// What is known of every place, as `Intervals` of the Python side.
struct Intervals {
  double *upper, *lower, *center;
  bool* exact;
  int64_t count;

  // After a step by at most `bound`. What was not known may be anything.
  void move(const double* before, const double* bound) const {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const auto known = [](double x, double other) { return x == x ? x : other; };
    for (int64_t i = 0; i < count; ++i) {
      upper[i] = known(before[i] + bound[i], kInfinity);
      lower[i] = known(before[count + i] - bound[i], -kInfinity);
      center[i] = known(before[2 * count + i], -kInfinity);
      exact[i] = false;
    }
  }

  // Places of the `first` largest upper and the `first` smallest lower bounds.
  Places promising(int64_t first) const {
    Places places(static_cast<size_t>(count)), chosen;
    std::iota(places.begin(), places.end(), 0);
    const auto middle = places.begin() + std::min(first, count);
    std::partial_sort(places.begin(), middle, places.end(), [&](int64_t a, int64_t b) {
      return upper[a] != upper[b] ? upper[a] > upper[b] : a < b;
    });
    chosen.assign(places.begin(), middle);
    std::partial_sort(places.begin(), middle, places.end(), [&](int64_t a, int64_t b) {
      return lower[a] != lower[b] ? lower[a] < lower[b] : a < b;
    });
    chosen.insert(chosen.end(), places.begin(), middle);
    return chosen;
  }

  void compute(const Symbols& symbols, const Places& places) const {
    const std::vector<double> found = symbols.extremes(places);
    for (size_t i = 0; i < places.size(); ++i) {
      const int64_t at = places[i];
      upper[at] = found[i];
      lower[at] = center[at] = found[places.size() + i];
      exact[at] = true;
    }
  }
};

// The Python side's `screen_warm`, with its constants as arguments: (3, places) intervals after a
// step by at most (places,) bounds, and which of them are exact.
std::tuple<Tensor, Tensor> symbol_step_cpu(Tensor terms, Tensor waves, Tensor before, Tensor bound,
                                           int64_t n, int64_t first, double error, double zero,
                                           double drift) {
  const Symbols symbols(terms, waves, n);
  const int64_t count = symbols.places();
  const double* old = doubles(before, 2, "before");
  const double* step = doubles(bound, 1, "bound");
  STD_TORCH_CHECK(
      before.size(0) == 3 && before.size(1) == count && bound.numel() == count && first > 0, kOp,
      ": expected (3, places) intervals and a bound per place");
  Tensor after = torch::stable::empty({3, count}, ScalarType::Double);
  Tensor exact = torch::stable::empty({count}, ScalarType::Bool);
  double* upper = static_cast<double*>(after.mutable_data_ptr());
  const Intervals known{upper, upper + count, upper + 2 * count,
                        static_cast<bool*>(exact.mutable_data_ptr()), count};
  known.move(old, step);
  const Places chosen = known.promising(first);
  known.compute(symbols, chosen);
  double best = known.upper[chosen[0]], least = known.lower[chosen[0]];
  for (const int64_t at : chosen) {
    best = std::max(best, known.upper[at]);
    least = std::min(least, known.lower[at]);
  }
  Places left, tested;
  std::vector<double> levels;
  for (int64_t i = 0; i < count; ++i) {
    if (known.exact[i]) continue;
    if (known.upper[i] > best * (1 + error)) {
      left.push_back(i);
    } else if (known.lower[i] < least * (1 - error) && least > zero * best) {
      // Nothing is below zero.
      tested.push_back(i);
      levels.push_back(std::max(known.center[i] - drift * step[i], least * (1 - error / 2)));
    }
  }
  const std::vector<bool> proven = symbols.proven(tested, levels);
  for (size_t i = 0; i < tested.size(); ++i) {
    if (proven[i]) {
      known.lower[tested[i]] = levels[i];
    } else {
      left.push_back(tested[i]);
    }
  }
  known.compute(symbols, left);
  return {after, exact};
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("symbol_extremes(Tensor terms, Tensor waves, Tensor places, int n) -> Tensor");
  m.def(
      "symbol_step(Tensor terms, Tensor waves, Tensor before, Tensor bound, int n, int first, "
      "float error, float zero, float drift) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("symbol_extremes", TORCH_BOX(&tscnc::symbol_extremes_cpu));
  m.impl("symbol_step", TORCH_BOX(&tscnc::symbol_step_cpu));
}
