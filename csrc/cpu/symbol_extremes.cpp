#include "symbol_extremes.h"

#include "hermitian_lanes.h"

namespace tscnc::TSCNC_ISA {
namespace {

constexpr int64_t kWidth = kLanes<double>;

// Lower triangles of the Gram matrices of the next frequencies, one per lane; `waves` is memory for
// the lanes' cosines and sines, as one complex number per shift. Lanes without a frequency of their
// own repeat the last one.
void evaluate(const GramTerms& gram, const int64_t* chosen, int64_t used, Complex* waves,
              Complex* triangle) {
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    const int64_t row = chosen[lane < used ? lane : used - 1] * gram.shifts;
    for (int64_t d = 0; d < gram.shifts; ++d) {
      waves[d].re[lane] = gram.cosines[row + d];
      waves[d].im[lane] = gram.sines[row + d];
    }
  }
  const double* term = gram.terms;
  for (int64_t block = 0; block < term_blocks(gram.n); ++block, triangle += kTermElements) {
    Complex sums[kTermElements] = {};
    for (int64_t d = 0; d < gram.shifts; ++d, term += 2 * kTermElements) {
      const Complex wave = waves[d];
      for (int64_t e = 0; e < kTermElements; ++e) {
        sums[e].re += term[e] * wave.re;
        sums[e].im += term[kTermElements + e] * wave.im;
      }
    }
    for (int64_t e = 0; e < kTermElements; ++e) triangle[e] = sums[e];
  }
}

}  // namespace

void symbol_extremes(const GramTerms& gram, const int64_t* chosen, int64_t count, double* largest,
                     double* smallest, double* workspace) {
  const int64_t n = gram.n;
  Complex* waves = reinterpret_cast<Complex*>(workspace);
  Complex* triangle = waves + gram.shifts;
  Complex* work = triangle + term_blocks(n) * kTermElements;
  Lanes* diagonal = reinterpret_cast<Lanes*>(work + 4 * n);
  Lanes* squares = diagonal + n;
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    const int64_t used = count - begin < kWidth ? count - begin : kWidth;
    evaluate(gram, chosen + begin, used, waves, triangle);
    tridiagonalize(triangle, n, work, diagonal, squares);
    const Ends ends = extreme_eigenvalues(diagonal, squares, n);
    store_partial(largest + begin, ends.largest, used);
    store_partial(smallest + begin, ends.smallest, used);
  }
}

void symbol_floors(const GramTerms& gram, const int64_t* chosen, const double* levels,
                   int64_t count, unsigned char* proven, double* workspace) {
  // A complex operation loses up to 4 units of 2^-53; a factorisation n + 1 of them per unit of
  // trace, and the sums of the terms fewer.
  const double unit = 4 * (static_cast<double>(gram.n) + 8) * 0x1p-53;
  Complex* waves = reinterpret_cast<Complex*>(workspace);
  Complex* triangle = waves + gram.shifts;
  for (int64_t begin = 0; begin < count; begin += kWidth) {
    const int64_t used = count - begin < kWidth ? count - begin : kWidth;
    evaluate(gram, chosen + begin, used, waves, triangle);
    Lanes trace{};
    for (int64_t i = 0; i < gram.n; ++i) trace += triangle[i * (i + 3) / 2].re;
    const Lanes level = load_partial(levels + begin, used) + unit * trace;
    for (int64_t i = 0; i < gram.n; ++i) triangle[i * (i + 3) / 2].re -= level;
    const Lanes least = least_pivot(triangle, gram.n);
    for (int64_t lane = 0; lane < used; ++lane) proven[begin + lane] = least[lane] > 0;
  }
}

int64_t symbol_extremes_workspace(int64_t n, int64_t shifts) {
  return kWidth * (2 * (shifts + term_blocks(n) * kTermElements + 4 * n) + 2 * n);
}

}  // namespace tscnc::TSCNC_ISA
