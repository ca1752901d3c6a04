// The launchers of masked_optimizer.cu with a C interface.
#include "cuda/masked_optimizer.cu"

using namespace tscnc;

extern "C" int sgd_step(const cuda::StepItem* items, int64_t count, const SgdOptions* options) {
  return cuda::launch_masked_sgd_step(items, count, *options, nullptr);
}

extern "C" int adamw_step(const cuda::StepItem* items, const cuda::StepCount* counts, int64_t count,
                          double lr, const AdamwOptions* options, double* workspace) {
  return cuda::launch_masked_adamw_step(items, counts, count, lr, *options, workspace, nullptr);
}
