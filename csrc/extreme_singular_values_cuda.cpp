// extreme_singular_values on CUDA: the matrices whose smaller side fits into a block, and the
// gradient of all. Python side: tscnc_kernels/_spectral_cuda.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifdef TSCNC_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/extreme_singular_values.h"
#include "cuda_stream.h"
#include "cuda_tensors.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "extreme_singular_values";

struct Jobs {
  std::vector<cuda::SpectralJob> list;
  int64_t rows = 0, cols = 0, smaller = 0;

  int64_t count() const { return static_cast<int64_t>(list.size()); }
};

const bool* mask_of(const Tensor& mask, const Tensor& matrix) {
  if (mask.numel() == 0) return nullptr;
  check_on_device(kOp, mask, matrix, "masks");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
                      mask.dim() == 2 && mask.size(0) == matrix.size(0) &&
                      mask.size(1) == matrix.size(1),
                  kOp, ": expected a contiguous boolean mask of the matrix's shape");
  return static_cast<const bool*>(mask.const_data_ptr());
}

const int64_t* structure_of(const Tensor& structure, const Tensor& matrix) {
  if (structure.numel() == 0) return nullptr;
  check_on_device(kOp, structure, matrix, "structures");
  STD_TORCH_CHECK(structure.scalar_type() == ScalarType::Long && structure.is_contiguous() &&
                      structure.numel() == 1 + matrix.size(0) + matrix.size(1),
                  kOp, ": expected the structure as structural_rank returns it");
  return static_cast<const int64_t*>(structure.const_data_ptr());
}

Jobs make_jobs(const Tensors& matrices, const Tensors& masks, const Tensors& structures) {
  STD_TORCH_CHECK(!matrices.empty(), kOp, ": expected at least one matrix, got an empty list");
  STD_TORCH_CHECK((masks.empty() || masks.size() == matrices.size()) &&
                      (structures.empty() || structures.size() == masks.size()),
                  kOp, ": expected one mask and one structure per matrix");
  Jobs jobs;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& matrix = matrices[i];
    check_on_device(kOp, matrix, matrices[0], "matrices");
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous() && matrix.numel() > 0, kOp,
                    ": expected contiguous matrices with at least one element");
    const int64_t rows = matrix.size(0), cols = matrix.size(1);
    STD_TORCH_CHECK(std::max(rows, cols) <= std::numeric_limits<int32_t>::max(), kOp,
                    ": more than 2^31 - 1 rows or columns");
    jobs.list.push_back(
        {matrix.const_data_ptr(), masks.empty() ? nullptr : mask_of(masks[i], matrix),
         structures.empty() ? nullptr : structure_of(structures[i], matrix),
         static_cast<int32_t>(rows), static_cast<int32_t>(cols), cuda_dtype(kOp, matrix)});
    jobs.rows += rows;
    jobs.cols += cols;
    jobs.smaller += std::min(rows, cols);
  }
  return jobs;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape,
             ScalarType type = ScalarType::Double) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
  return torch::stable::new_empty(like, sizes, type);
}

template <class T = double>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs of a forward call.
struct ForwardOutputs {
  Tensor sigma, left, right, block, state, rank, residual, flags, ties, bounds;

  ForwardOutputs(const Tensor& like, const Jobs& jobs, bool certify)
      : sigma(empty(like, {2, jobs.count()})),
        left(empty(like, {2, jobs.rows})),
        right(empty(like, {2, jobs.cols})),
        block(empty(like, {2 * cuda::kTiedRows, jobs.smaller})),
        state(empty(like, {4, jobs.smaller})),
        rank(empty(like, {jobs.count()}, ScalarType::Long)),
        residual(empty(like, {jobs.count(), 2})),
        flags(empty(like, {jobs.count()}, ScalarType::Long)),
        ties(empty(like, {jobs.count(), 2}, ScalarType::Long)),
        bounds(empty(like, {certify ? jobs.count() : 0, 3, 2})) {}

  cuda::SpectralOutputs pointers(const Jobs& jobs) const {
    return {data(sigma),         data(left),          data(right),    data(block),
            data(state),         data<int64_t>(rank), data(residual), data<int64_t>(flags),
            data<int64_t>(ties), data(bounds),        jobs.count(),   jobs.rows,
            jobs.cols,           jobs.smaller};
  }
  Outputs tensors() const {
    return {sigma, left, right, block, state, rank, residual, flags, ties, bounds};
  }
};

const double* checked_state(const Tensor& state, const Tensor& like, const Jobs& jobs) {
  check_on_device(kOp, state, like, "state");
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == 4 && state.size(1) == jobs.smaller &&
                      state.scalar_type() == ScalarType::Double && state.is_contiguous(),
                  kOp, ": expected a contiguous float64 state of shape (4, ", jobs.smaller, ")");
  return static_cast<const double*>(state.const_data_ptr());
}

// The op extreme_singular_values without compressed rows, for smaller sides up to kSmallSide.
Outputs extreme_singular_values_small_cuda(Tensors matrices, Tensors masks, Tensors structures,
                                           std::optional<Tensor> state, bool structural,
                                           double tie_tol, bool power, bool certify,
                                           bool largest_only) {
  const Jobs jobs = make_jobs(matrices, masks, structures);
  for (const cuda::SpectralJob& job : jobs.list) {
    STD_TORCH_CHECK(std::min(job.rows, job.cols) <= cuda::kSmallSide, kOp,
                    ": expected a smaller side of at most ", cuda::kSmallSide, ", got ", job.rows,
                    " x ", job.cols);
  }
  const Tensor& like = matrices[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const double* warm = state.has_value() ? checked_state(*state, like, jobs) : nullptr;
  const ForwardOutputs outputs(like, jobs, certify);
  const Tensor workspace =
      empty(like, {cuda::extreme_singular_values_workspace(jobs.list.data(), jobs.count())});
  const cuda::SpectralSettings settings = {tie_tol, structural, power, certify, largest_only};
  check_cuda(cuda::launch_extreme_singular_values(jobs.list.data(), settings, warm,
                                                  outputs.pointers(jobs), data(workspace), nullptr,
                                                  current_cuda_stream(like.get_device_index())),
             kOp);
  return outputs.tensors();
}

// The same from a state for matrices of any size: passes over the matrices, and the factorisations
// of the small ones that these did not settle. Nothing tells the host which those are.
Outputs extreme_singular_values_warm_cuda(Tensors matrices, Tensors masks, Tensors structures,
                                          Tensor state, bool structural, double tie_tol,
                                          bool largest_only) {
  const Jobs jobs = make_jobs(matrices, masks, structures);
  const Tensor& like = matrices[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const double* warm = checked_state(state, like, jobs);
  const ForwardOutputs outputs(like, jobs, false);
  const auto* list = jobs.list.data();
  const int64_t count = jobs.count();
  const Tensor workspace =
      empty(like, {std::max(cuda::warm_singular_values_workspace(list, count),
                            cuda::extreme_singular_values_workspace(list, count))});
  const Tensor counters = empty(like, {count * cuda::kWarmCounters}, ScalarType::Int);
  const cuda::SpectralSettings settings = {tie_tol, structural, false, false, largest_only};
  const cudaStream_t stream = current_cuda_stream(like.get_device_index());
  check_cuda(cuda::launch_warm_singular_values(list, settings, warm, outputs.pointers(jobs),
                                               data(workspace), data<int32_t>(counters), stream),
             kOp);
  const bool has_small = std::any_of(jobs.list.begin(), jobs.list.end(), [](const auto& job) {
    return std::min(job.rows, job.cols) <= cuda::kSmallSide;
  });
  if (has_small) {
    check_cuda(
        cuda::launch_extreme_singular_values(list, settings, warm, outputs.pointers(jobs),
                                             data(workspace), data<int32_t>(counters), stream),
        kOp);
  }
  return outputs.tensors();
}

const void* checked_data(const Tensor& tensor, int64_t numel, ScalarType type, const Tensor& like) {
  check_on_device(kOp, tensor, like, "the outputs");
  STD_TORCH_CHECK(tensor.numel() == numel && tensor.scalar_type() == type && tensor.is_contiguous(),
                  kOp, ": expected the outputs of the forward call");
  return tensor.const_data_ptr();
}

Tensors extreme_singular_values_backward_cuda(Tensor grad_sigma, Tensors matrices, Tensors masks,
                                              Tensor sigma, Tensor left, Tensor right, Tensor block,
                                              Tensor ties) {
  const Jobs jobs = make_jobs(matrices, masks, {});
  const Tensor& like = matrices[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int64_t count = jobs.count();
  // Sigma and the vectors come in the dtype that the user sees.
  for (Tensor* shown : {&grad_sigma, &sigma, &left, &right}) {
    *shown = torch::stable::to(*shown, ScalarType::Double);
  }
  const auto doubles = [&](const Tensor& tensor, int64_t numel) {
    return static_cast<const double*>(checked_data(tensor, numel, ScalarType::Double, like));
  };
  const cuda::SpectralResults results = {
      doubles(grad_sigma, 2 * count),
      doubles(sigma, 2 * count),
      doubles(left, 2 * jobs.rows),
      doubles(right, 2 * jobs.cols),
      doubles(block, 2 * cuda::kTiedRows * jobs.smaller),
      static_cast<const int64_t*>(checked_data(ties, 2 * count, ScalarType::Long, like)),
      count,
      jobs.rows,
      jobs.cols,
      jobs.smaller};
  Tensors gradients;
  std::vector<void*> targets;
  for (const Tensor& matrix : matrices) {
    gradients.push_back(torch::stable::empty_like(matrix));
    targets.push_back(gradients.back().mutable_data_ptr());
  }
  const Tensor workspace =
      empty(like, {cuda::extreme_singular_values_backward_workspace(jobs.list.data(), count)});
  check_cuda(cuda::launch_extreme_singular_values_backward(
                 jobs.list.data(), results, targets.data(), data(workspace),
                 current_cuda_stream(like.get_device_index())),
             kOp);
  return gradients;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CUDA, m) {
  m.impl("extreme_singular_values_small", TORCH_BOX(&tscnc::extreme_singular_values_small_cuda));
  m.impl("extreme_singular_values_warm", TORCH_BOX(&tscnc::extreme_singular_values_warm_cuda));
  m.impl("extreme_singular_values_backward",
         TORCH_BOX(&tscnc::extreme_singular_values_backward_cuda));
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "extreme_singular_values_small(Tensor[] matrices, Tensor[] masks, Tensor[] structures, "
      "Tensor? state, bool structural, float tie_tol, bool power, bool certify, "
      "bool largest_only) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "extreme_singular_values_warm(Tensor[] matrices, Tensor[] masks, Tensor[] structures, "
      "Tensor state, bool structural, float tie_tol, bool largest_only) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
