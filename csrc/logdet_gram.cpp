// logdet_gram over a list of weights; Python side and formula: tscnc_kernels/ops/logdet_gram.py.
#include "cpu/logdet_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dtype_dispatch.h"
#include "torch_parallel.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "logdet_gram";

struct Matrix {
  int64_t rows, cols;
  int64_t n;       // the small side
  int64_t offset;  // of its n x n factor among all factors
  bool large;      // worth all threads; small ones are shared out instead
};

// Multiply-adds of a Gram from which threads inside one matrix pay (about half a millisecond of one
// core).
constexpr int64_t kLargeWork = 1 << 23;
// A list with less work than this runs on the calling thread.
constexpr int64_t kSerialWork = 1 << 18;

struct Plan {
  std::vector<Matrix> matrices;
  int64_t factors = 0;  // elements of all factors
  int64_t work = 0;     // of the small matrices
};

Plan plan_of(const Tensors& weights) {
  check_list(kOp, weights);
  Plan plan;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, kOp, ": expected non-empty matrices");
    const int64_t rows = weight.size(0), cols = weight.size(1), n = std::min(rows, cols);
    const int64_t work = weight.numel() * n;
    plan.matrices.push_back({rows, cols, n, plan.factors, work >= kLargeWork});
    plan.factors += n * n;
    if (work < kLargeWork) plan.work += work;
  }
  return plan;
}

// Calls run(index, threads) for every matrix, small ones at the same time.
template <class Run>
void for_each_matrix(const Plan& plan, const Run& run) {
  std::vector<size_t> small;
  for (size_t i = 0; i < plan.matrices.size(); ++i) {
    if (plan.matrices[i].large) {
      run(i, &torch_parallel_for);
    } else {
      small.push_back(i);
    }
  }
  if (plan.work < kSerialWork) {
    for (const size_t i : small) run(i, nullptr);
    return;
  }
  torch::stable::parallel_for(0, small.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(small[i], nullptr);
  });
}

// Calls function(TypeTag<T>{}) with T = float or double.
template <class Function>
void dispatch(const Tensor& weight, const Function& function) {
  if (weight.scalar_type() == ScalarType::Double) {
    function(TypeTag<double>{});
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, kOp,
                    ": expected float32 or float64 weights");
    function(TypeTag<float>{});
  }
}

double* data(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

Tensor doubles(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Double, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor> logdet_gram_cpu(Tensors weights, double ridge) {
  const Plan plan = plan_of(weights);
  Tensor factors = doubles(plan.factors, weights[0]);
  Tensor values = doubles(static_cast<int64_t>(weights.size()), weights[0]);
  dispatch(weights[0], [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = TSCNC_SELECT(logdet_gram<T>);
    const auto workspace_size = TSCNC_SELECT(logdet_gram_workspace);
    for_each_matrix(plan, [&](size_t i, ParallelFor threads) {
      const Matrix& m = plan.matrices[i];
      Tensor workspace = doubles(workspace_size(m.rows, m.cols), values);
      const T* weight = static_cast<const T*>(weights[i].const_data_ptr());
      data(values)[i] =
          kernel(weight, m.rows, m.cols, ridge, data(factors) + m.offset, data(workspace), threads);
    });
  });
  return {values, factors};
}

Tensors logdet_gram_backward_cpu(Tensor grad_output, Tensors weights, Tensor factors,
                                 double ridge) {
  const Plan plan = plan_of(weights);
  STD_TORCH_CHECK(grad_output.numel() == static_cast<int64_t>(weights.size()) &&
                      grad_output.is_contiguous() &&
                      grad_output.scalar_type() == ScalarType::Double,
                  kOp, ": expected a contiguous float64 grad_output with one element per weight");
  STD_TORCH_CHECK(factors.numel() == plan.factors && factors.is_contiguous() &&
                      factors.scalar_type() == ScalarType::Double,
                  kOp, ": expected the factors that the forward call returned");
  Tensors gradients;
  for (const Tensor& weight : weights) gradients.push_back(torch::stable::empty_like(weight));
  dispatch(weights[0], [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = TSCNC_SELECT(logdet_gram_backward<T>);
    const auto workspace_size = TSCNC_SELECT(logdet_gram_backward_workspace);
    const double* scale = static_cast<const double*>(grad_output.const_data_ptr());
    const double* factor = static_cast<const double*>(factors.const_data_ptr());
    for_each_matrix(plan, [&](size_t i, ParallelFor threads) {
      const Matrix& m = plan.matrices[i];
      Tensor workspace = doubles(workspace_size(m.rows, m.cols), factors);
      kernel(static_cast<const T*>(weights[i].const_data_ptr()), m.rows, m.cols, ridge,
             factor + m.offset, scale[i], static_cast<T*>(gradients[i].mutable_data_ptr()),
             data(workspace), threads);
    });
  });
  return gradients;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def("logdet_gram(Tensor[] weights, float ridge) -> (Tensor, Tensor)");
  m.def(
      "logdet_gram_backward(Tensor grad_output, Tensor[] weights, Tensor factors, float ridge) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("logdet_gram", TORCH_BOX(&tscnc::logdet_gram_cpu));
  m.impl("logdet_gram_backward", TORCH_BOX(&tscnc::logdet_gram_backward_cpu));
}
