// CUDA kernels of masked_conv2d; formula: tscnc_kernels/ops/masked_conv2d.py.
//
// Images are contiguous (B, C, H, W) in device memory. No launcher waits for the GPU or reads
// device memory: an index is trusted to be what SparsityPattern built. All sums are in a fixed
// order, in float (double for double).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/activation.h"
#include "../include/dtype.h"
#include "masked_linear.h"

namespace tscnc::cuda {

// One of the two axes: sizes of the images and of the results; `before` is the padding in front.
struct ConvAxis {
  int64_t size, results, kernel, stride, before, dilation;
};

// A convolution and its kept weights, as a matrix of out_channels rows with a column per input
// channel of a group, kernel row and kernel column.
struct ConvCall {
  int64_t images, in_channels, out_channels, groups;
  ConvAxis height, width;
  KeptEntries entries;     // row by row
  KeptEntries transposed;  // column by column, for the gradient of the input
  KeptValues values;       // the permutation leads from `transposed` to `entries`
  DType dtype;
};

// Whether the kernels' 32-bit offsets and 16-bit positions are large enough for the images.
bool conv_fits(const ConvCall& call);

// Bytes of device memory for the product, or for the gradient of the input.
int64_t conv_product_workspace(const ConvCall& call, bool is_gradient);

// output = act(input * weight + bias); `bias` and `preactivation` may be null.
cudaError_t launch_conv_product(const ConvCall& call, const void* input, const void* bias,
                                Activation activation, void* output, void* preactivation,
                                void* workspace, cudaStream_t stream);

cudaError_t launch_conv_input_gradient(const ConvCall& call, const void* gradient, void* result,
                                       void* workspace, cudaStream_t stream);

// The gradient of the kept values, (kept,).
int64_t conv_weight_gradient_workspace(const ConvCall& call);
cudaError_t launch_conv_weight_gradient(const ConvCall& call, const void* gradient,
                                        const void* input, void* result, void* workspace,
                                        cudaStream_t stream);

// The sum of the gradient over images and pixels, (out_channels,).
cudaError_t launch_conv_bias_gradient(const ConvCall& call, const void* gradient, void* result,
                                      cudaStream_t stream);

// grad_output times the activation's derivative; `saved` is the activation's result for relu, its
// argument for gelu. Contiguous tensors of `count` entries.
cudaError_t launch_scaled_gradient(const void* grad_output, const void* saved, int64_t count,
                                   Activation activation, DType dtype, void* result,
                                   cudaStream_t stream);

}  // namespace tscnc::cuda
