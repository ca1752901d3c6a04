// The launchers of masked_conv2d_weight_gradient.cu with a C interface.
#include "cuda/masked_conv2d_weight_gradient.cu"

using namespace tscnc::cuda;

extern "C" int64_t weight_workspace(const ConvCall* call) {
  return conv_weight_gradient_workspace(*call);
}

extern "C" int weight_gradient(const ConvCall* call, const void* gradient, const void* input,
                               void* result, void* workspace) {
  return launch_conv_weight_gradient(*call, gradient, input, result, workspace, nullptr);
}

extern "C" int bias_gradient(const ConvCall* call, const void* gradient, void* result) {
  return launch_conv_bias_gradient(*call, gradient, result, nullptr);
}
