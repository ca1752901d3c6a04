// The launchers of masked_conv2d.cu with a C interface.
#include "cuda/masked_conv2d.cu"

using namespace tscnc;
using namespace tscnc::cuda;

extern "C" bool fits(const ConvCall* call) { return conv_fits(*call); }

extern "C" int64_t product_workspace(const ConvCall* call, bool is_gradient) {
  return conv_product_workspace(*call, is_gradient);
}

extern "C" int product(const ConvCall* call, const void* input, const void* bias,
                       int64_t activation, void* output, void* preactivation, void* workspace) {
  return launch_conv_product(*call, input, bias, Activation(activation), output, preactivation,
                             workspace, nullptr);
}

extern "C" int input_gradient(const ConvCall* call, const void* gradient, void* result,
                              void* workspace) {
  return launch_conv_input_gradient(*call, gradient, result, workspace, nullptr);
}

extern "C" int scaled_gradient(const void* grad_output, const void* saved, int64_t count,
                               int64_t activation, int dtype, void* result) {
  return launch_scaled_gradient(grad_output, saved, count, Activation(activation), DType(dtype),
                                result, nullptr);
}
