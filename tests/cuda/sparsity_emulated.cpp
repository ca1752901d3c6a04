// The launchers of sparsity.cu with a C interface.
#include "cuda/sparsity.cu"

using namespace tscnc::cuda;

extern "C" int pack_mask(const bool* mask, int64_t count, uint8_t* bits) {
  return launch_pack_mask(mask, count, bits, nullptr);
}

extern "C" int64_t workspace_length(int64_t rows, int64_t width) {
  return pattern_workspace_length(rows, width);
}

extern "C" int pattern_counts(const PatternIndex* index, int64_t* kept) {
  return launch_pattern_counts(*index, kept, nullptr);
}

extern "C" int pattern_lists(const PatternIndex* index, int64_t kept) {
  return launch_pattern_lists(*index, kept, nullptr);
}
