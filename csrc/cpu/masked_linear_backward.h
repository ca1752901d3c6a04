// Both gradients of a masked product in one pass: whatever of the output's gradient a kept entry
// loads serves its term of the input's gradient and its own gradient.
#pragma once

#include "masked_linear.h"

namespace tscnc {

// input_gradient = gradient S, and values_gradient[j] += (gradient^T input) at the kept entry j.
// `transposed` is S^T; both kinds of values are in its order.
template <class T>
struct MaskedBackward {
  SparseRows transposed;
  const Working<T>* values;
  Samples<T> input;
  Samples<T> gradient;
  Results<T> input_gradient;  // (count, transposed.rows)
  Working<T>* values_gradient;
  Working<T>* bias_gradient;  // (transposed.width,) of sums over the samples, or null
};

// Elements of Working<T> that one thread needs on a transposed structure of this width.
TSCNC_PER_ISA(template <class T> int64_t masked_linear_backward_scratch(int64_t width);)

// The rows [begin, end) of the transposed structure, and entries [bias_begin, bias_end) of the
// bias's gradient, over all samples in order.
TSCNC_PER_ISA(template <class T> void masked_linear_backward(const MaskedBackward<T>& call,
                                                             int64_t begin, int64_t end,
                                                             int64_t bias_begin, int64_t bias_end,
                                                             Working<T>* scratch);)

}  // namespace tscnc
