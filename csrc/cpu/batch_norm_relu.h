// Batch normalisation and ReLU in two passes: statistics, then output; sums, then gradient.
#pragma once

#include <cstdint>

#include "isa.h"
#include "storage_types.h"

namespace tscnc {

// A contiguous (outer, channels, length) tensor. Planes of at least kPlaneLength entries are read
// one channel after another, whose second pass then finds it in the cache. Shorter ones are read as
// rows of channels * length columns, column j of channel j / length.
struct BatchNormShape {
  int64_t outer, channels, length;
  int64_t columns() const { return channels * length; }
};

// y = max(0, (x - mean) scale + bias), without the maximum if not `relu`.
struct BatchNormChannel {
  double mean, scale, bias;
  bool relu;
  // Of the gradient: dx = scale g - slope (x - mean) - level.
  double slope, level;
};

// Mean and sum of squared deviations; or sum of the gradient and of its products with x - mean.
struct BatchNormSums {
  double first, second;
};

// A range of rows and columns of the row form.
struct BatchNormBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};

// Columns of a block, which its working memory bounds.
constexpr int64_t kBatchNormColumns = 512;

TSCNC_PER_ISA(
    template <class T>
    BatchNormSums batch_norm_plane_statistics(const T* input, BatchNormShape shape,
                                              int64_t channel);
    template <class T> void batch_norm_plane_output(const T* input, T* output, BatchNormShape shape,
                                                    int64_t channel, const BatchNormChannel& how);
    template <class T>
    BatchNormSums batch_norm_plane_sums(const T* grad_output, const T* input, BatchNormShape shape,
                                        int64_t channel, const BatchNormChannel& how);
    template <class T> void batch_norm_plane_gradient(const T* grad_output, const T* input,
                                                      T* grad_input, BatchNormShape shape,
                                                      int64_t channel, const BatchNormChannel& how);
    // One result per column of the block, or one `how` per channel of the tensor.
    template <class T> void batch_norm_row_statistics(const T* input, BatchNormShape shape,
                                                      BatchNormBlock block, BatchNormSums* sums);
    template <class T>
    void batch_norm_row_output(const T* input, T* output, BatchNormShape shape,
                               BatchNormBlock block, const BatchNormChannel* how);
    template <class T> void batch_norm_row_sums(const T* grad_output, const T* input,
                                                BatchNormShape shape, BatchNormBlock block,
                                                const BatchNormChannel* how, BatchNormSums* sums);
    template <class T>
    void batch_norm_row_gradient(const T* grad_output, const T* input, T* grad_input,
                                 BatchNormShape shape, BatchNormBlock block,
                                 const BatchNormChannel* how);)

}  // namespace tscnc
