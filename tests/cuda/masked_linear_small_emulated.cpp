// The launchers of masked_linear_small.cu with a C interface.
#include "cuda/masked_linear_small.cu"

using namespace tscnc::cuda;

extern "C" int64_t product_workspace(const ProductCall*) { return 0; }
extern "C" int product(const ProductCall* call, void*) {
  return launch_small_product(*call, nullptr);
}
extern "C" int product_fits(const ProductCall* call) { return small_product_fits(*call); }
extern "C" int64_t weight_workspace(const WeightGradientCall*) { return 0; }
extern "C" int weight_gradient(const WeightGradientCall* call, void*) {
  return launch_small_weight_gradient(*call, nullptr);
}
extern "C" int weight_gradient_fits(const WeightGradientCall* call) {
  return small_weight_gradient_fits(*call);
}
