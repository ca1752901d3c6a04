// The launchers of sparsity_values.cu with a C interface.
#include "cuda/sparsity_values.cu"

using namespace tscnc::cuda;

extern "C" int gather(const KeptEntries* entries, const void* matrix, int64_t row_stride,
                      int64_t column_stride, void* values, int dtype) {
  return launch_gather(*entries, matrix, row_stride, column_stride, values, tscnc::DType(dtype),
                       nullptr);
}
extern "C" int scatter(const KeptEntries* entries, const void* values, void* matrix, int dtype) {
  return launch_scatter(*entries, values, matrix, tscnc::DType(dtype), nullptr);
}
extern "C" int mask(const void* input, const uint8_t* bits, int64_t count, void* output,
                    int dtype) {
  return launch_mask(input, bits, count, output, tscnc::DType(dtype), nullptr);
}
