// The launcher of extreme_singular_values_warm.cu with a C interface.
#include "cuda/extreme_singular_values_warm.cu"

using namespace tscnc::cuda;

extern "C" int64_t warm_workspace(const SpectralJob* jobs, int64_t count) {
  return warm_singular_values_workspace(jobs, count);
}
extern "C" int warm_counters() { return kWarmCounters; }
extern "C" int settled_counter() { return kSettled; }
extern "C" int warm_singular_values(const SpectralJob* jobs, const SpectralSettings* settings,
                                    const double* warm, const SpectralOutputs* outputs,
                                    double* workspace, int32_t* counters) {
  return launch_warm_singular_values(jobs, *settings, warm, *outputs, workspace, counters, nullptr);
}
