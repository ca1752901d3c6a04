#pragma once

#include <cstdint>

#include "isa.h"

namespace tscnc {

// Gram matrices G(f) = sum over d of cos(f, d) S_d + i sin(f, d) A_d of one group, with real
// symmetric S_d and antisymmetric A_d, d < shifts.
struct GramTerms {
  // Blocks of kTermElements elements of the lower triangle by rows, zeros behind the last one; of a
  // block, for each d, its elements of S_d and then of A_d.
  const double* terms;
  // (frequencies, shifts) each.
  const double* cosines;
  const double* sines;
  int64_t n, shifts;
};

constexpr int64_t kTermElements = 4;

static inline constexpr int64_t term_blocks(int64_t n) {
  return (n * (n + 1) / 2 + kTermElements - 1) / kTermElements;
}

TSCNC_PER_ISA(
    // largest[i] and smallest[i] = extreme eigenvalues of G(chosen[i]), i < count, to rounding of
    // its norm. Workspace: symbol_extremes_workspace(n, shifts) doubles, aligned to 64 bytes.
    void symbol_extremes(const GramTerms& gram, const int64_t* chosen, int64_t count,
                         double* largest, double* smallest, double* workspace);
    // proven[i] = 1 if the least eigenvalue of G(chosen[i]) is at least levels[i], what rounding
    // may do being charged, and 0 if that could not be shown. The same workspace.
    void symbol_floors(const GramTerms& gram, const int64_t* chosen, const double* levels,
                       int64_t count, unsigned char* proven, double* workspace);
    int64_t symbol_extremes_workspace(int64_t n, int64_t shifts);)

}  // namespace tscnc
