// The launchers of masked_linear_weight_gradient.cu with a C interface.
#include "cuda/masked_linear_weight_gradient.cu"

using namespace tscnc::cuda;

extern "C" int64_t weight_workspace(const WeightGradientCall* call) {
  return weight_gradient_workspace(*call);
}
extern "C" int weight_gradient(const WeightGradientCall* call, void* workspace) {
  return launch_weight_gradient(*call, workspace, nullptr);
}
extern "C" int64_t bias_workspace(const SampleMatrix* gradient, int dtype) {
  return bias_gradient_workspace(*gradient, tscnc::DType(dtype));
}
extern "C" int bias_gradient(const SampleMatrix* gradient, void* result, int dtype,
                             void* workspace) {
  return launch_bias_gradient(*gradient, result, tscnc::DType(dtype), workspace, nullptr);
}
