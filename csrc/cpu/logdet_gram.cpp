#include "logdet_gram.h"

#include <cmath>
#include <limits>

#include "gram.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

int64_t min_side(int64_t rows, int64_t cols) { return rows < cols ? rows : cols; }
int64_t max_side(int64_t rows, int64_t cols) { return rows < cols ? cols : rows; }

// Lines of the long side whose gradient is computed at once, in double, before it is rounded to T.
int64_t chunk_of(int64_t rows, int64_t cols) {
  constexpr int64_t kChunk = 512;
  return max_side(rows, cols) < kChunk ? max_side(rows, cols) : kChunk;
}

// The weight as a tall matrix: its transpose where it is wide.
template <class T>
linalg::View<T> tall(const T* weight, int64_t rows, int64_t cols) {
  const linalg::View<T> view{weight, cols, 1};
  return rows < cols ? view.transposed() : view;
}

// H = inverse(G) + ridge * trace(inverse(G)) / n * I: the second term is the ridge's own dependence
// on the weight.
void differentiate_ridge(int64_t n, double ridge, double* inverse) {
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += inverse[i * n + i];
  const double shift = ridge * trace / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] += shift;
}

}  // namespace

int64_t logdet_gram_workspace(int64_t rows, int64_t cols) {
  const int64_t n = min_side(rows, cols);
  return n + linalg::multiply_workspace(max_side(rows, cols), n);
}

int64_t logdet_gram_backward_workspace(int64_t rows, int64_t cols) {
  const int64_t n = min_side(rows, cols), lines = chunk_of(rows, cols);
  return linalg::multiply_workspace(n, n < lines ? lines : n) + 2 * n * n + lines * n;
}

template <class T>
double logdet_gram(const T* weight, int64_t rows, int64_t cols, double ridge, double* factor,
                   double* workspace, ParallelFor parallel) {
  const int64_t n = min_side(rows, cols), m = max_side(rows, cols);
  double* floors = workspace + linalg::multiply_workspace(m, n);
  linalg::gram_lower(m, n, tall(weight, rows, cols), factor, workspace, parallel);
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += factor[i * n + i];
  if (!std::isfinite(trace)) {
    factor[0] = kNan;
    return kNan;
  }
  const double shift = ridge * trace / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    factor[i * n + i] += shift;
    // What rounding alone can leave of a pivot that is zero.
    floors[i] = static_cast<double>(m) * kEpsilon * factor[i * n + i];
  }
  if (linalg::cholesky_lower(n, factor, floors, workspace, parallel) < n) {
    factor[0] = kNan;
    return -kInfinity;
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::log(factor[i * n + i]);
  return 2 * sum - static_cast<double>(n) * std::log(static_cast<double>(n));
}

template <class T>
void logdet_gram_backward(const T* weight, int64_t rows, int64_t cols, double ridge,
                          const double* factor, double scale, T* gradient, double* workspace,
                          ParallelFor parallel) {
  const int64_t n = min_side(rows, cols), m = max_side(rows, cols), lines = chunk_of(rows, cols);
  if (std::isnan(factor[0])) {
    for (int64_t i = 0; i < rows * cols; ++i) gradient[i] = static_cast<T>(kNan);
    return;
  }
  double* packed = workspace;  // first, where it is aligned
  double* inverted = packed + linalg::multiply_workspace(n, n < lines ? lines : n);
  double* inverse = inverted + n * n;
  double* chunk = inverse + n * n;
  linalg::invert_lower(n, factor, inverted, packed, parallel);
  linalg::inverse_from_inverted_factor(n, inverted, inverse, packed, parallel);
  differentiate_ridge(n, ridge, inverse);
  const linalg::View<double> h{inverse, n, 1};
  const linalg::View<T> w{weight, cols, 1};
  for (int64_t begin = 0; begin < m; begin += lines) {
    const int64_t count = m - begin < lines ? m - begin : lines;
    std::memset(chunk, 0, sizeof(double) * count * n);
    T* target = gradient + begin;
    int64_t height = n, width = count;
    if (rows < cols) {  // 2 H W, columns begin..
      linalg::multiply_add(n, count, n, 2 * scale, h, w.at(0, begin), chunk, count, false, packed,
                           parallel);
    } else {  // 2 W H, rows begin..
      linalg::multiply_add(count, n, n, 2 * scale, w.at(begin, 0), h, chunk, n, false, packed,
                           parallel);
      target = gradient + begin * cols;
      height = count;
      width = n;
    }
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        target[i * cols + j] = static_cast<T>(chunk[i * width + j]);
      }
    }
  }
}

#define TSCNC_INSTANTIATE(T)                                                                       \
  template double logdet_gram<T>(const T*, int64_t, int64_t, double, double*, double*,             \
                                 ParallelFor);                                                     \
  template void logdet_gram_backward<T>(const T*, int64_t, int64_t, double, const double*, double, \
                                        T*, double*, ParallelFor);
TSCNC_INSTANTIATE(float)
TSCNC_INSTANTIATE(double)

}  // namespace tscnc::TSCNC_ISA
