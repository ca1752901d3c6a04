// The launchers of transformed_l1.cu with a C interface.
#include "cuda/transformed_l1.cu"

using tscnc::DType;

extern "C" int64_t workspace_length(const int64_t* numels, int64_t count, int dtype) {
  return tscnc::cuda::transformed_l1_workspace_length(numels, count, DType(dtype));
}

extern "C" int transformed_l1(const void* const* inputs, void* const* grads, const int64_t* numels,
                              int64_t count, int dtype, double a, void* value, double* workspace,
                              const void* grad_output) {
  return tscnc::cuda::launch_transformed_l1(inputs, grads, numels, count, DType(dtype), a, value,
                                            workspace, grad_output, nullptr);
}
