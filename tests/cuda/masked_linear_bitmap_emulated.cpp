// The launchers of masked_linear_bitmap.cu with a C interface.
#include "cuda/masked_linear_bitmap.cu"

using namespace tscnc::cuda;

extern "C" int64_t chunk(int dtype) { return bitmap_chunk(tscnc::DType(dtype)); }
extern "C" int product_fits(const BitmapCall* call) { return bitmap_product_fits(*call); }
extern "C" int product(const BitmapCall* call) { return launch_bitmap_product(*call, nullptr); }
