// The launcher of extreme_singular_values.cu with a C interface.
#include "cuda/extreme_singular_values.cu"

using namespace tscnc::cuda;

extern "C" int64_t workspace(const SpectralJob* jobs, int64_t count) {
  return extreme_singular_values_workspace(jobs, count);
}
extern "C" int warm_counters() { return kWarmCounters; }
extern "C" int settled_counter() { return kSettled; }
extern "C" int extreme_singular_values(const SpectralJob* jobs, const SpectralSettings* settings,
                                       const double* warm, const SpectralOutputs* outputs,
                                       double* workspace, const int32_t* settled) {
  return launch_extreme_singular_values(jobs, *settings, warm, *outputs, workspace, settled,
                                        nullptr);
}
