// The launcher of extreme_singular_values_backward.cu with a C interface.
#include "cuda/extreme_singular_values_backward.cu"

using namespace tscnc::cuda;

extern "C" int64_t backward_workspace(const SpectralJob* jobs, int64_t count) {
  return extreme_singular_values_backward_workspace(jobs, count);
}
extern "C" int backward(const SpectralJob* jobs, const SpectralResults* results,
                        void* const* gradients, double* workspace) {
  return launch_extreme_singular_values_backward(jobs, *results, gradients, workspace, nullptr);
}
