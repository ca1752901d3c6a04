// The launchers of hard_concrete.cu with a C interface.
#include "cuda/hard_concrete.cu"

using tscnc::cuda::GateCall;

extern "C" int hard_concrete(const GateCall* call, void* gates) {
  return tscnc::cuda::launch_hard_concrete(*call, gates, nullptr);
}

extern "C" int hard_concrete_backward(const GateCall* call, const void* grad_output,
                                      void* gradient) {
  return tscnc::cuda::launch_hard_concrete_backward(*call, grad_output, gradient, nullptr);
}
