#pragma once

#include <cstdint>
#include <type_traits>

#include "include/activation.h"
#include "include/host_device.h"
#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// The type that products of storage type T are summed in.
template <class T>
using Working = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the kept entries are: row r holds columns[pointers[r] .. pointers[r + 1]), ascending.
struct SparseRows {
  const int32_t* pointers;
  const int32_t* columns;
  int64_t rows;
  int64_t width;
};

// A (count, features) matrix with any strides. Where `saved` is not null, every entry is multiplied
// by the activation's derivative at the same place of the (count, features) matrix `saved`.
template <class T>
struct Samples {
  const T* data;
  int64_t count;
  int64_t features;
  int64_t sample_stride;
  int64_t feature_stride;
  const T* saved;
  int64_t saved_sample_stride;
  int64_t saved_feature_stride;
  Activation activation;
};

// Where a (count, features) matrix is written: row-major, or feature-major, the samples of a
// feature next to each other. One of the strides is 1.
template <class T>
struct Results {
  T* data;
  int64_t sample_stride;
  int64_t feature_stride;
};

// output = act(input S^T + bias), S the sparse matrix with `values` in the order of its structure.
template <class T>
struct MaskedProduct {
  SparseRows structure;
  const Working<T>* values;
  Samples<T> input;
  const T* bias;  // (rows,) or null
  Activation activation;
  Results<T> output;         // (count, rows)
  Results<T> preactivation;  // the same without the activation; its data may be null
  int64_t row_splits;
};

// values_gradient[j] += (gradient^T input) at the kept entry j; bias_gradient[r] += sum of
// gradient's column r.
template <class T>
struct MaskedWeightGradient {
  SparseRows structure;
  Samples<T> input;
  Samples<T> gradient;
  Working<T>* values_gradient;  // (nnz,) or null
  Working<T>* bias_gradient;    // (rows,) or null
};

// First row of part `part` when the rows are cut into `parts` of about equal work.
TSCNC_HD int64_t row_split(const SparseRows& structure, int64_t part, int64_t parts) {
  const int64_t rows = structure.rows;
  const int64_t target = (structure.pointers[rows] + rows) * part / parts;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (structure.pointers[middle] + middle < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Samples in a panel; the last panel of a batch may hold fewer and be narrower.
TSCNC_PER_ISA(template <class T> int64_t masked_linear_lanes();)

// Elements of Working<T> that one thread needs for either kernel on a structure of this width.
TSCNC_PER_ISA(template <class T> int64_t masked_linear_scratch(int64_t width);)

// The items [begin, end) of a product. Item panel * row_splits + split computes one range of rows
// for one panel of samples; neighbours share the packed panel.
TSCNC_PER_ISA(template <class T> void masked_linear_product(const MaskedProduct<T>& call,
                                                            int64_t begin, int64_t end,
                                                            Working<T>* scratch);)

// The rows [begin, end) of a weight gradient, over all samples in order.
TSCNC_PER_ISA(template <class T>
              void masked_linear_weight_gradient(const MaskedWeightGradient<T>& call, int64_t begin,
                                                 int64_t end, Working<T>* scratch);)

}  // namespace tscnc
