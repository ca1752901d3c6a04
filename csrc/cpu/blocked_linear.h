// masked_linear with blocks of features that stay in the first-level cache.
#pragma once

#include "include/blocked_index.h"
#include "masked_linear.h"

namespace tscnc {

// output = act(input S^T + bias), S the sparse matrix with `values`.
template <class T>
struct BlockedProduct {
  BlockedRows index;
  // (rows,), where each row's values begin; null for values in the order of the index.
  const int32_t* starts;
  const Working<T>* values;
  Samples<T> input;
  const T* bias;  // (rows,) or null
  Activation activation;
  Results<T> output;         // (count, rows)
  Results<T> preactivation;  // the same without the activation; its data may be null
  int64_t tile_splits;
};

// values_gradient[j] += (gradient^T input) at the kept entry j, row-major; bias_gradient[r] += sum
// of gradient's column r.
template <class T>
struct BlockedWeightGradient {
  BlockedRows index;
  const int32_t* starts;  // (rows,), where each row's values begin
  Samples<T> input;
  Samples<T> gradient;
  Working<T>* values_gradient;  // (kept,) or null
  Working<T>* bias_gradient;    // (rows,) or null
};

// Samples in a panel.
TSCNC_PER_ISA(template <class T> int64_t blocked_lanes();)

// Elements of Working<T> that one thread needs for either kernel.
TSCNC_PER_ISA(template <class T> int64_t blocked_scratch(const BlockedRows& index);)

// The items [begin, end) of a product. Item panel * tile_splits + split computes one range of tiles
// for one panel of samples; neighbours share the packed panel.
TSCNC_PER_ISA(template <class T> void blocked_product(const BlockedProduct<T>& call, int64_t begin,
                                                      int64_t end, Working<T>* scratch);)

// The tiles [begin, end) of a weight gradient, over all samples in order.
TSCNC_PER_ISA(template <class T> void blocked_weight_gradient(const BlockedWeightGradient<T>& call,
                                                              int64_t begin, int64_t end,
                                                              Working<T>* scratch);)

}  // namespace tscnc
