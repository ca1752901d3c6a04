// The launchers of batch_norm_relu.cu with a C interface.
#include "cuda/batch_norm_relu.cu"

using namespace tscnc::cuda;

extern "C" int64_t workspace(const BatchNormCall* call) { return batch_norm_workspace(*call); }

extern "C" int forward(const BatchNormCall* call, const void* input, bool is_given, double* mean,
                       double* variance, void* output, void* workspace) {
  return launch_batch_norm(*call, input, is_given, mean, variance, output, workspace, nullptr);
}

extern "C" int backward(const BatchNormCall* call, const void* grad_output, const void* input,
                        const double* mean, const double* variance, bool training, void* grad_input,
                        double* grad_weight, double* grad_bias, void* workspace) {
  return launch_batch_norm_backward(*call, grad_output, input, mean, variance, training, grad_input,
                                    grad_weight, grad_bias, workspace, nullptr);
}
