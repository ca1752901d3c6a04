// masked_linear for patterns of r x c blocks: four rows that keep the same columns share every load
// of a feature.
#pragma once

#include "masked_linear.h"

namespace tscnc {

// Rows of equal columns that are computed together.
constexpr int64_t kGroupRows = 4;

// Group g is the rows [starts[g], starts[g + 1]): kGroupRows rows that keep the same columns, or
// one.
struct RowGroups {
  const int32_t* starts;
  int64_t count;
};

// Samples in a panel; the last panel of a batch may hold fewer and be narrower.
TSCNC_PER_ISA(template <class T> int64_t block_lanes();)

// Elements of Working<T> that one thread needs for either kernel on a structure of this width.
TSCNC_PER_ISA(template <class T> int64_t block_scratch(int64_t width);)

// The items [begin, end) of a product. Item panel * row_splits + split computes one range of groups
// for one panel of samples; neighbours share the packed panel.
TSCNC_PER_ISA(template <class T> void block_product(const MaskedProduct<T>& call,
                                                    const RowGroups& groups, int64_t begin,
                                                    int64_t end, Working<T>* scratch);)

// The groups [begin, end) of a weight gradient, over all samples in order.
TSCNC_PER_ISA(template <class T> void block_weight_gradient(const MaskedWeightGradient<T>& call,
                                                            const RowGroups& groups, int64_t begin,
                                                            int64_t end, Working<T>* scratch);)

}  // namespace tscnc
