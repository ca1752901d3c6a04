// The two leading eigenvectors at both ends of a dense symmetric matrix, at a fixed cost:
// Householder reduction to tridiagonal form (Golub & Van Loan, 8.3.1), multisection of the four
// eigenvalues by Sturm counts, their vectors by twisted factorisations (Dhillon & Parlett 2004) and
// back through the reflections. The arithmetic of the reduction is T's.
#pragma once

#include <cfloat>

#include "dense_symmetric.h"

namespace tscnc::TSCNC_ISA {

// Rows that one step of the update takes; rows and columns are those of dense_symmetric.h, and the
// kLanes<T> square blocks on the diagonal are kept whole.
constexpr int64_t kReducedRows = kVectorBytes == 64 ? 4 : 2;

template <class T>
inline T dot_of(const T* x, const T* y, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kLanes<T>;
  Vec<T> sum0 = {}, sum1 = {};
  int64_t i = begin / kStep * kStep;
  for (; i + 2 * kStep <= end; i += 2 * kStep) {
    sum0 += load(x + i) * load(y + i);
    sum1 += load(x + i + kStep) * load(y + i + kStep);
  }
  for (; i < end; i += kStep) sum0 += load(x + i) * load(y + i);
  return sum_lanes<T>(sum0 + sum1);
}

// A -= v w' + w v', then y := A x, in one pass over the upper triangle behind row `begin`. v, w and
// x vanish before `begin`.
template <class T>
inline void update_and_multiply(T* a, int64_t ld, int64_t begin, int64_t n, const T* v, const T* w,
                                const T* x, T* y) {
  constexpr int64_t kStep = kLanes<T>, kRows = kReducedRows;
  for (int64_t j = begin / kStep * kStep; j < n + kRows; ++j) y[j] = 0;
  for (int64_t i = begin / kRows * kRows; i < n; i += kRows) {
    const int64_t block = i / kStep * kStep;
    T* row = a + i * ld;
    Vec<T> vi[kRows], wi[kRows], xi[kRows], sum[kRows];
    {
      const Vec<T> vj = load(v + block), wj = load(w + block), xj = load(x + block);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kRows; ++q) {
        vi[q] = broadcast(v[i + q]);
        wi[q] = broadcast(w[i + q]);
        xi[q] = broadcast(x[i + q]);
        const Vec<T> element = load(row + q * ld + block) - vi[q] * wj - wi[q] * vj;
        store(row + q * ld + block, element);
        sum[q] = element * xj;
      }
    }
    for (int64_t j = block + kStep; j < n; j += kStep) {
      const Vec<T> vj = load(v + j), wj = load(w + j), xj = load(x + j);
      Vec<T> yj = load(y + j);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kRows; ++q) {
        const Vec<T> element = load(row + q * ld + j) - vi[q] * wj - wi[q] * vj;
        store(row + q * ld + j, element);
        sum[q] += element * xj;
        yj += element * xi[q];
      }
      store(y + j, yj);
    }
    for (int64_t q = 0; q < kRows; ++q) y[i + q] += sum_lanes<T>(sum[q]);
  }
}

// Reduces a to the tridiagonal matrix of diagonal d and off-diagonal e; the reflection 1 - tau v v'
// of step c stays in a's row c right of the diagonal and in tau[c]. work: 4 ld, zeros behind n.
template <class T>
inline void reduce(T* a, int64_t ld, int64_t n, double* d, double* e, T* tau, T* work) {
  T *v = work, *w = work + ld, *x = work + 2 * ld, *y = work + 3 * ld;
  std::memset(work, 0, static_cast<size_t>(4 * ld) * sizeof(T));
  for (int64_t c = 0; c < n; ++c) {
    T* row = a + c * ld;
    const T vc = v[c], wc = w[c];
    for (int64_t j = c; j < n; ++j) row[j] -= vc * w[j] + wc * v[j];
    v[c] = w[c] = 0;
    d[c] = row[c];
    tau[c] = 0;
    e[c] = c + 1 < n ? row[c + 1] : 0;
    if (c + 2 >= n) continue;
    std::memcpy(x + c + 1, row + c + 1, static_cast<size_t>(n - c - 1) * sizeof(T));
    x[c] = 0;
    const T head = x[c + 1], squares = dot_of(x, x, c + 1, n);
    T scale = 0;
    if (squares > head * head) {
      const T norm = std::sqrt(squares), alpha = head > 0 ? -norm : norm;
      e[c] = alpha;
      x[c + 1] = row[c + 1] = head - alpha;
      scale = tau[c] = 2 / (squares + alpha * alpha - 2 * alpha * head);
    }
    update_and_multiply(a, ld, c + 1, n, v, w, x, y);
    for (int64_t j = (c + 1) / 16 * 16; j <= c; ++j) y[j] = 0;
    const T half = scale * scale / 2 * dot_of(x, y, c + 1, n);
    for (int64_t j = c + 1; j < n; ++j) {
      v[j] = scale == 0 ? 0 : x[j];
      w[j] = scale * y[j] - half * x[j];
    }
  }
}

// x := the product of all reflections times x, for four vectors.
template <class T>
inline void reflect_back(const T* a, int64_t ld, int64_t n, const T* tau, T* x) {
  constexpr int64_t kStep = kLanes<T>;
  for (int64_t c = n - 3; c >= 0; --c) {
    if (tau[c] == 0) continue;
    const T* v = a + c * ld;
    // The vector that holds v's beginning, without what lies before it.
    const int64_t block = (c + 1) / kStep * kStep;
    T head[kStep];
    for (int64_t j = 0; j < kStep; ++j) head[j] = block + j > c ? v[block + j] : 0;
    const Vec<T> first = load(head);
    Vec<T> sum[4];
    for (int q = 0; q < 4; ++q) sum[q] = first * load(x + q * ld + block);
    for (int64_t j = block + kStep; j < n; j += kStep) {
      const Vec<T> element = load(v + j);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[q] += element * load(x + q * ld + j);
    }
    for (int q = 0; q < 4; ++q) {
      const Vec<T> scale = broadcast(tau[c] * sum_lanes<T>(sum[q]));
      T* target = x + q * ld;
      store(target + block, load(target + block) - scale * first);
      for (int64_t j = block + kStep; j < n; j += kStep) {
        store(target + j, load(target + j) - scale * load(v + j));
      }
    }
  }
}

// The four wanted eigenvalues of a tridiagonal matrix: largest, second, smallest, second smallest.
class SturmSections {
 public:
  static constexpr int kShifts = 16;

  // e: squared[i] becomes e_i^2. scale: an upper bound of all |eigenvalues|.
  SturmSections(int64_t n, const double* d, const double* squared, double scale)
      : n_(n), d_(d), squared_(squared), tiny_(DBL_MIN + 0x1p-100 * scale) {}

  // counts[s] := how many eigenvalues lie below shifts[s].
  void count(const double* shifts, int64_t* counts) const {
    constexpr int kVectors = kShifts / static_cast<int>(kWidth);
    VecD shift[kVectors], pivot[kVectors], below[kVectors];
    for (int s = 0; s < kVectors; ++s) {
      shift[s] = load(shifts + s * kWidth);
      pivot[s] = broadcast(1.0);
      below[s] = VecD{};
    }
    const VecD tiny = broadcast(tiny_), one = broadcast(1.0), none = {};
    for (int64_t i = 0; i < n_; ++i) {
      const VecD square = broadcast(i > 0 ? squared_[i - 1] : 0.0), diagonal = broadcast(d_[i]);
#pragma GCC unroll 8
      for (int s = 0; s < kVectors; ++s) {
        const VecD next = (diagonal - shift[s]) - square / pivot[s];
        pivot[s] = abs(next) < tiny ? -tiny : next;
        below[s] += pivot[s] < none ? one : none;
      }
    }
    for (int s = 0; s < kVectors; ++s) {
      double lanes[kWidth];
      store(lanes, below[s]);
      for (int64_t l = 0; l < kWidth; ++l) counts[s * kWidth + l] = static_cast<int64_t>(lanes[l]);
    }
  }

  // values: by bisection to the relative width `close`; `top` bounds all eigenvalues, none of
  // which is below zero but by rounding.
  void find(double top, double close, double values[4]) const {
    constexpr int kEach = kShifts / 4;
    const double least = 0x1p-52 * top;
    const int64_t wanted[4] = {n_ - 1, n_ > 1 ? n_ - 2 : 0, 0, n_ > 1 ? 1 : 0};
    double low[4] = {}, high[4] = {top, top, top, top};
    for (int sweep = 0; sweep < 64; ++sweep) {
      double shifts[kShifts];
      int64_t counts[kShifts];
      bool open = false;
      for (int t = 0; t < 4; ++t) {
        open |= high[t] - low[t] > close * high[t] && high[t] > least;
        const double floor = low[t] > least ? low[t] : least;
        double* own = shifts + t * kEach;
        if (high[t] > 64 * floor) {
          own[1] = std::sqrt(floor * high[t]);
          own[0] = std::sqrt(floor * own[1]);
          own[2] = std::sqrt(own[1] * high[t]);
          own[3] = std::sqrt(own[2] * high[t]);
        } else {
          const double step = (high[t] - low[t]) / (kEach + 1);
          for (int s = 0; s < kEach; ++s) own[s] = low[t] + step * (s + 1);
        }
      }
      if (!open) break;
      count(shifts, counts);
      // Every count speaks of all four.
      for (int t = 0; t < 4; ++t) {
        for (int s = 0; s < kShifts; ++s) {
          if (counts[s] <= wanted[t]) {
            if (shifts[s] > low[t]) low[t] = shifts[s];
          } else if (shifts[s] < high[t]) {
            high[t] = shifts[s];
          }
        }
      }
    }
    for (int t = 0; t < 4; ++t) values[t] = low[t] + (high[t] - low[t]) / 2;
  }

 private:
  int64_t n_;
  const double *d_, *squared_;
  double tiny_;
};

// Four eigenvectors of the tridiagonal matrix at the given eigenvalues, each one step of inverse
// iteration from the best unit vector: the factorisations from both ends meet where their pivot is
// smallest. z: 4 rows of length ld, not normalised. work: 8 n.
inline void twisted_vectors(int64_t n, const double* d, const double* e, const double* squared,
                            const double values[4], double tiny, double* z, int64_t ld,
                            double* work) {
  using Four __attribute__((vector_size(32))) = double;
  Four value;
  std::memcpy(&value, values, sizeof(value));
  const Four none = {}, small = none + tiny;
  double *down = work, *up = work + 4 * n;
  Four forward = none + 1.0, backward = none + 1.0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = n - 1 - i;
    forward = (d[i] - value) - (i > 0 ? squared[i - 1] : 0.0) / forward;
    backward = (d[k] - value) - (i > 0 ? squared[k] : 0.0) / backward;
    forward = (forward < small) & (forward > -small) ? -small : forward;
    backward = (backward < small) & (backward > -small) ? -small : backward;
    std::memcpy(down + 4 * i, &forward, sizeof(forward));
    std::memcpy(up + 4 * k, &backward, sizeof(backward));
  }
  for (int q = 0; q < 4; ++q) {
    int64_t twist = 0;
    double least = DBL_MAX;
    for (int64_t i = 0; i < n; ++i) {
      const double pivot = std::fabs(down[4 * i + q] + up[4 * i + q] - (d[i] - values[q]));
      if (pivot < least) least = pivot, twist = i;
    }
    double* target = z + q * ld;
    std::memset(target, 0, static_cast<size_t>(ld) * sizeof(double));
    target[twist] = 1;
    for (int64_t i = twist; i > 0; --i)
      target[i - 1] = -(e[i - 1] / down[4 * (i - 1) + q]) * target[i];
    for (int64_t i = twist; i + 1 < n; ++i)
      target[i + 1] = -(e[i] / up[4 * (i + 1) + q]) * target[i];
  }
}

}  // namespace tscnc::TSCNC_ISA
