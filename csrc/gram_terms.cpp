// Terms of the Gram matrices of a convolution's symbols; Python side and formula:
// tscnc_kernels/_symbol_search.py.
#include "cpu/gram_terms.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/symbol_extremes.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t groups, out, inner, rows, cols;
};

// Taps of one group's (out, inner, rows * cols) kernels for the Gram matrices of the smaller side.
template <class T>
Taps<T> pack_taps(const T* kernels, const Shape& shape, T* strips) {
  const int64_t taps = shape.rows * shape.cols, n = std::min(shape.out, shape.inner);
  const int64_t m = std::max(shape.out, shape.inner);
  const int64_t tap_size = (n + kTapStrip<T> - 1) / kTapStrip<T> * kTapStrip<T> * m;
  std::fill(strips, strips + taps * tap_size, T(0));
  for (int64_t o = 0; o < shape.out; ++o) {
    for (int64_t i = 0; i < shape.inner; ++i) {
      const int64_t row = n == shape.inner ? o : i, col = n == shape.inner ? i : o;
      T* target = strips + (col / kTapStrip<T> * m + row) * kTapStrip<T> + col % kTapStrip<T>;
      for (int64_t tap = 0; tap < taps; ++tap) target[tap * tap_size] = *kernels++;
    }
  }
  return {strips, shape.rows, shape.cols, m, n, tap_size};
}

// Correlations C_d (shifts, n, n) as what GramTerms holds: S_d = C_d + C_d^T, A_d = C_d^T - C_d,
// but S_0 = C_0.
template <class T>
void pack_terms(const T* source, int64_t shifts, int64_t n, T* packed) {
  std::fill(packed, packed + term_blocks(n) * shifts * 2 * kTermElements, T(0));
  int64_t element = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j, ++element) {
      T* block =
          packed + element / kTermElements * shifts * 2 * kTermElements + element % kTermElements;
      block[0] = source[i * n + j];
      for (int64_t d = 1; d < shifts; ++d) {
        const T here = source[(d * n + i) * n + j], there = source[(d * n + j) * n + i];
        block[d * 2 * kTermElements] = here + there;
        block[d * 2 * kTermElements + kTermElements] = there - here;
      }
    }
  }
}

// Calls run(y, x) for zero and one of each pair of shifts between taps, in tap_shifts' order.
template <class Run>
void for_each_shift(const Shape& shape, const Run& run) {
  for (int64_t down = 0; down < shape.rows; ++down) {
    for (int64_t right = down == 0 ? 0 : 1 - shape.cols; right < shape.cols; ++right) {
      run(down, right);
    }
  }
}

template <class T>
void gram_terms_of(const T* kernels, const Shape& shape, T* packed) {
  struct Piece {
    int64_t down, right, row, correlation;
  };
  const int64_t n = std::min(shape.out, shape.inner);
  const int64_t size = shape.out * shape.inner * shape.rows * shape.cols;
  std::vector<Piece> pieces;
  int64_t shifts = 0;
  for_each_shift(shape, [&](int64_t down, int64_t right) {
    for (int64_t row = 0; row < n; row += kTermRows) {
      pieces.push_back({down, right, row, shifts * n * n});
    }
    ++shifts;
  });
  std::vector<T> strips(
      static_cast<size_t>(size / n * (n + kTapStrip<T> - 1) / kTapStrip<T> * kTapStrip<T>));
  std::vector<T> correlations(static_cast<size_t>(shifts * n * n));
  const auto kernel = TSCNC_SELECT(correlate<T>);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const Taps<T> taps = pack_taps(kernels + group * size, shape, strips.data());
    torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 8,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    const Piece& piece = pieces[static_cast<size_t>(i)];
                                    kernel(taps, piece.down, piece.right, piece.row,
                                           correlations.data() + piece.correlation);
                                  }
                                });
    pack_terms(correlations.data(), shifts, n,
               packed + group * term_blocks(n) * shifts * 2 * kTermElements);
  }
}

// (groups, blocks, shifts, 2, kTermElements) terms of (groups, out, inner, rows, cols) kernels.
Tensor gram_terms_cpu(Tensor kernels) {
  STD_TORCH_CHECK(kernels.dim() == 5 && kernels.numel() > 0 && kernels.is_contiguous(),
                  "gram_terms: expected contiguous kernels of 5 dimensions");
  const Shape shape{kernels.size(0), kernels.size(1), kernels.size(2), kernels.size(3),
                    kernels.size(4)};
  int64_t shifts = 0;
  for_each_shift(shape, [&](int64_t, int64_t) { ++shifts; });
  const int64_t blocks = term_blocks(std::min(shape.out, shape.inner));
  Tensor packed =
      torch::stable::empty({shape.groups, blocks, shifts, 2, kTermElements}, kernels.scalar_type());
  if (kernels.scalar_type() == ScalarType::Double) {
    gram_terms_of(static_cast<const double*>(kernels.const_data_ptr()), shape,
                  static_cast<double*>(packed.mutable_data_ptr()));
  } else {
    STD_TORCH_CHECK(kernels.scalar_type() == ScalarType::Float,
                    "gram_terms: expected float32 or float64 kernels");
    gram_terms_of(static_cast<const float*>(kernels.const_data_ptr()), shape,
                  static_cast<float*>(packed.mutable_data_ptr()));
  }
  return packed;
}

// (groups, 2, shifts, shifts) Frobenius products of the S_d and of the A_d of (groups, blocks,
// shifts, 2, kTermElements) terms in float32, of n x n matrices.
Tensor term_products_cpu(Tensor terms, int64_t n) {
  STD_TORCH_CHECK(terms.dim() == 5 && terms.scalar_type() == ScalarType::Float &&
                      terms.is_contiguous() && n > 0 && terms.size(1) == term_blocks(n) &&
                      terms.size(3) == 2 && terms.size(4) == kTermElements,
                  "term_products: expected what gram_terms returns of float32 kernels");
  const int64_t groups = terms.size(0), blocks = terms.size(1), shifts = terms.size(2);
  Tensor result = torch::stable::empty({groups, 2, shifts, shifts}, ScalarType::Double);
  double* products = static_cast<double*>(result.mutable_data_ptr());
  std::fill(products, products + result.numel(), 0.0);
  const float* term = static_cast<const float*>(terms.const_data_ptr());
  std::vector<double> wide(static_cast<size_t>(shifts * 2 * kTermElements)), scaled(wide.size());
  for (int64_t group = 0; group < groups; ++group, products += 2 * shifts * shifts) {
    int64_t row = 0, diagonal = 0;
    for (int64_t block = 0; block < blocks; ++block, term += shifts * 2 * kTermElements) {
      // An element below the diagonal stands for two.
      double weights[kTermElements];
      for (int64_t e = 0; e < kTermElements; ++e) {
        const bool own = block * kTermElements + e == diagonal;
        weights[e] = own ? 1 : 2;
        if (own) diagonal += ++row + 1;
      }
      for (size_t i = 0; i < wide.size(); ++i) {
        wide[i] = term[i];
        scaled[i] = wide[i] * weights[i % kTermElements];
      }
      for (int64_t part = 0; part < 2; ++part) {
        double* target = products + part * shifts * shifts;
        for (int64_t d = 0; d < shifts; ++d) {
          const double* left = scaled.data() + (2 * d + part) * kTermElements;
          for (int64_t other = 0; other <= d; ++other) {
            const double* right = wide.data() + (2 * other + part) * kTermElements;
            double sum = 0;
            for (int64_t e = 0; e < kTermElements; ++e) sum += left[e] * right[e];
            target[d * shifts + other] += sum;
          }
        }
      }
    }
    for (int64_t part = 0; part < 2; ++part) {
      double* target = products + part * shifts * shifts;
      for (int64_t d = 0; d < shifts; ++d) {
        for (int64_t other = d + 1; other < shifts; ++other) {
          target[d * shifts + other] = target[other * shifts + d];
        }
      }
    }
  }
  return result;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("gram_terms(Tensor kernels) -> Tensor");
  m.def("term_products(Tensor terms, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("gram_terms", TORCH_BOX(&tscnc::gram_terms_cpu));
  m.impl("term_products", TORCH_BOX(&tscnc::term_products_cpu));
}
