// The launcher of masked_linear.cu with a C interface.
#include "cuda/masked_linear.cu"

using namespace tscnc::cuda;

extern "C" int64_t product_workspace(const ProductCall* call) {
  return panel_product_workspace(*call);
}
extern "C" int product(const ProductCall* call, void* workspace) {
  return launch_panel_product(*call, workspace, nullptr);
}
