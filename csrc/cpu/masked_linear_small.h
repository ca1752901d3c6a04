// Products of few samples with a sparse matrix, whose entries are read once. A column outside the
// structure is taken modulo the next power of two: nothing outside is read or written then, so the
// index need not be looked at beforehand.
#pragma once

#include "masked_linear.h"

namespace tscnc {

// input_gradient = gradient S, S the sparse matrix with `values` in the order of its structure.
template <class T>
struct MaskedInputGradient {
  SparseRows structure;
  const Working<T>* values;
  Samples<T> gradient;
  Results<T> output;  // (count, width)
};

// One more than the largest column of 16 bits.
constexpr int64_t kNarrowWidth = 1 << 16;

// Elements of Working<T> that one thread needs for any function below, and at least kNarrowWidth
// for narrow columns.
TSCNC_PER_ISA(template <class T> int64_t small_batch_scratch(int64_t rows, int64_t width);)

// The rows [begin, end) of a product for every sample, one sample after the other. Narrow columns,
// unless null, take the place of the structure's: the time of one sample's product is that of
// reading the weight from memory.
TSCNC_PER_ISA(template <class T> void spmv_product(const MaskedProduct<T>& call,
                                                   const uint16_t* narrow, int64_t begin,
                                                   int64_t end, Working<T>* scratch);)

// The same for groups of up to 16 samples.
TSCNC_PER_ISA(template <class T> void small_batch_product(const MaskedProduct<T>& call,
                                                          int64_t begin, int64_t end,
                                                          Working<T>* scratch);)

// The columns [begin, end) of the gradient of the input: every row adds its multiples to the
// columns that it keeps, in the order of the rows, so that no transposed index is needed.
TSCNC_PER_ISA(template <class T> void small_batch_input_gradient(const MaskedInputGradient<T>& call,
                                                                 int64_t begin, int64_t end,
                                                                 Working<T>* scratch);)

// The rows [begin, end) of a weight gradient.
TSCNC_PER_ISA(template <class T>
              void small_batch_weight_gradient(const MaskedWeightGradient<T>& call, int64_t begin,
                                               int64_t end, Working<T>* scratch);)

}  // namespace tscnc
