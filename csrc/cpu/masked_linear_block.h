// Products with patterns of r x c blocks: four rows that keep the same columns share every load of
// a feature. The gradient of the weight gains nothing from blocks: a product with a held gradient
// needs one load per multiply-add, which panel.h makes part of the instruction.
#pragma once

#include "masked_linear.h"

namespace tscnc {

// Rows of equal columns are computed by fours; a group has at most kMaxGroupRows of them, which
// fill whole cache lines of a row-major output.
constexpr int64_t kGroupRows = 4;
constexpr int64_t kMaxGroupRows = 16;

// Group g is the rows [starts[g], starts[g + 1]), which keep the same columns: a multiple of
// kGroupRows, or one.
struct RowGroups {
  const int32_t* starts;
  int64_t count;
};

// Samples in a panel; the last panel of a batch may hold fewer and be narrower.
TSCNC_PER_ISA(template <class T> int64_t block_lanes();)

// Elements of Working<T> that one thread needs for a structure of this width.
TSCNC_PER_ISA(template <class T> int64_t block_scratch(int64_t width);)

// The items [begin, end) of a product. Item panel * row_splits + split computes one range of groups
// for one panel of samples; neighbours share the packed panel.
TSCNC_PER_ISA(template <class T> void block_product(const MaskedProduct<T>& call,
                                                    const RowGroups& groups, int64_t begin,
                                                    int64_t end, Working<T>* scratch);)

}  // namespace tscnc
