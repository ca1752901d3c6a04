// CUDA kernels of masked_linear; formula: tscnc_kernels/ops/masked_linear.py.
//
// No launcher waits for the GPU or reads device memory: an index is trusted to be what
// SparsityPattern built. All sums are in a fixed order, in float (double for double).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/activation.h"
#include "../include/dtype.h"

namespace tscnc::cuda {

// Where the kept entries of a rows x width matrix are: row r holds columns[pointers[r] ..
// pointers[r
// + 1]), ascending, `kept` in all. Device pointers.
struct KeptEntries {
  const int32_t* pointers;
  const int32_t* columns;
  int64_t rows, width, kept;
};

// What these entries hold. Flat: entry j is data[permutation[j]], or data[j] if there is no
// permutation. Dense: the entry at (row, column) is data[row * row_stride + column *
// column_stride].
struct KeptValues {
  const void* data;
  const int32_t* permutation;
  bool is_dense;
  int64_t row_stride, column_stride;
};

// A (count, width) matrix with any strides. Where `saved` is not null, every entry is multiplied by
// the activation's derivative at the same place of the contiguous matrix `saved`: the activation's
// result for relu, its argument for gelu.
struct SampleMatrix {
  const void* data;
  int64_t count, width, sample_stride, feature_stride;
  const void* saved;
  Activation activation;
};

// output = act(input S^T + bias), S the matrix of the kept entries.
struct ProductCall {
  KeptEntries entries;
  KeptValues values;
  SampleMatrix input;
  const void* bias;  // (rows,) or null
  Activation activation;
  void* output;         // (count, rows), contiguous
  void* preactivation;  // the same without the activation, or null
  DType dtype;
  // For few samples of a half type: read in place of entries.columns where it is not null.
  const uint16_t* narrow_columns = nullptr;
};

// Bytes of device memory that `launch_panel_product` needs; 0 if the device cannot be asked.
int64_t panel_product_workspace(const ProductCall& call);

// For many samples.
cudaError_t launch_panel_product(const ProductCall& call, void* workspace, cudaStream_t stream);

// Whether `launch_small_product` takes the call: one sample has to fit into shared memory.
bool small_product_fits(const ProductCall& call);

// For up to 16 samples at a time, bound by reading the kept entries.
cudaError_t launch_small_product(const ProductCall& call, cudaStream_t stream);

// `ProductCall` of a weight that comes as its kept values in row-major order, with the mask as bits
// in place of columns.
struct BitmapCall {
  const uint8_t* bits;    // entry i of the mask, row by row, is bit i % 8 of byte i / 8
  const int32_t* starts;  // (rows, chunks), kept entries before each row's chunk of columns
  const void* values;
  int64_t rows, width, kept;
  SampleMatrix input;
  const void* bias;
  Activation activation;
  void* output;
  void* preactivation;
  DType dtype;
};

// Columns of a chunk; 0 if there is no kernel for the type.
int64_t bitmap_chunk(DType dtype);

// Whether `launch_bitmap_product` takes the call: not float64, a width of whole words of the mask,
// and values and bits that are aligned to 16 bytes.
bool bitmap_product_fits(const BitmapCall& call);

// For up to 16 samples at a time, bound by reading values and mask. Multiplies the zeros too: what
// is not finite in a sample spreads to all of its results.
cudaError_t launch_bitmap_product(const BitmapCall& call, cudaStream_t stream);

// The gradient of the kept entries, (gradient^T input) at each of them.
struct WeightGradientCall {
  KeptEntries entries;
  SampleMatrix input;     // (count, width)
  SampleMatrix gradient;  // (count, rows)
  void* result;           // (kept,), or contiguous (rows, width) if is_dense
  bool is_dense;          // off the kept entries the result becomes zero
  DType dtype;
};

int64_t weight_gradient_workspace(const WeightGradientCall& call);
cudaError_t launch_weight_gradient(const WeightGradientCall& call, void* workspace,
                                   cudaStream_t stream);

// Whether `launch_small_weight_gradient` takes the call: all samples have to fit into shared
// memory.
bool small_weight_gradient_fits(const WeightGradientCall& call);
cudaError_t launch_small_weight_gradient(const WeightGradientCall& call, cudaStream_t stream);

// The sum of the gradient over the samples, into contiguous (gradient.width,) entries.
int64_t bias_gradient_workspace(const SampleMatrix& gradient, DType dtype);
cudaError_t launch_bias_gradient(const SampleMatrix& gradient, void* result, DType dtype,
                                 void* workspace, cudaStream_t stream);

}  // namespace tscnc::cuda
