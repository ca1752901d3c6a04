#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace tscnc {

// One weight matrix (rows x cols, contiguous, float or double); n = min(rows, cols), G = Gram of
// the small side plus ridge * trace / n on its diagonal.
TSCNC_PER_ISA(
    // logdet(G / n); -inf where G is numerically singular, NaN where the weight is not finite.
    // `factor` (n x n) receives what the gradient needs. Workspace: logdet_gram_workspace(rows,
    // cols) doubles.
    template <class T> double logdet_gram(const T* weight, int64_t rows, int64_t cols, double ridge,
                                          double* factor, double* workspace, ParallelFor parallel);
    // gradient (rows x cols) = scale * d logdet(G / n) / dW; NaN where the value is not finite.
    // Workspace: logdet_gram_backward_workspace(rows, cols) doubles.
    template <class T>
    void logdet_gram_backward(const T* weight, int64_t rows, int64_t cols, double ridge,
                              const double* factor, double scale, T* gradient, double* workspace,
                              ParallelFor parallel);
    int64_t logdet_gram_workspace(int64_t rows, int64_t cols);
    int64_t logdet_gram_backward_workspace(int64_t rows, int64_t cols);)

}  // namespace tscnc
