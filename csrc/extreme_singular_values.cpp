// extreme_singular_values over a list of matrices; Python side and formulas:
// tscnc_kernels/ops/extreme_singular_values.py.
#include "cpu/extreme_singular_values.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/warm_extremes.h"
#include "dtype_dispatch.h"
#include "scratch.h"
#include "sparse_index.h"

namespace tscnc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr char kOp[] = "extreme_singular_values";

// One matrix of the list with its place in the packed outputs.
struct Job {
  SpectralMatrix matrix;
  std::vector<int64_t> kept_rows, kept_cols;
  int64_t row_offset, col_offset, block_offset;
};

struct Packing {
  int64_t rows = 0, cols = 0, smaller = 0;
};

// Sums bytes eight at a time: 128 words of ones do not overflow theirs.
int64_t count_true(const bool* mask, int64_t count) {
  constexpr int64_t kWords = 128, kBytes = 8 * kWords;
  int64_t sum = 0, i = 0;
  for (; i + kBytes <= count; i += kBytes) {
    uint64_t total = 0;
    for (int64_t w = 0; w < kWords; ++w) {
      uint64_t word;
      std::memcpy(&word, mask + i + 8 * w, sizeof(word));
      total += word;
    }
    const uint64_t pairs = (total & 0x00ff00ff00ff00ffu) + ((total >> 8) & 0x00ff00ff00ff00ffu);
    sum += static_cast<int64_t>((pairs * 0x0001000100010001u) >> 48);
  }
  for (; i < count; ++i) sum += mask[i];
  return sum;
}

void check_same_shape(const Tensor& matrix, const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
                      mask.dim() == 2 && mask.size(0) == matrix.size(0) &&
                      mask.size(1) == matrix.size(1),
                  kOp, ": expected a contiguous boolean mask of the matrix's shape");
}

// Row and column lists from the flags of structural_rank; a complete list stays null.
void keep_live(const Tensor& structure, bool structural, Job* job) {
  SpectralMatrix& a = job->matrix;
  STD_TORCH_CHECK(structure.scalar_type() == ScalarType::Long && structure.is_contiguous() &&
                      structure.numel() == 1 + a.rows + a.cols,
                  kOp, ": expected the structure as structural_rank returns it");
  const int64_t* flags = static_cast<const int64_t*>(structure.const_data_ptr());
  a.want_full_rank = !structural;
  if (structural) {
    for (int64_t i = 0; i < a.rows; ++i) {
      if (flags[1 + i]) job->kept_rows.push_back(i);
    }
    for (int64_t j = 0; j < a.cols; ++j) {
      if (flags[1 + a.rows + j]) job->kept_cols.push_back(j);
    }
    a.kept_row_count = static_cast<int64_t>(job->kept_rows.size());
    a.kept_col_count = static_cast<int64_t>(job->kept_cols.size());
    if (a.kept_row_count < a.rows) a.kept_rows = job->kept_rows.data();
    if (a.kept_col_count < a.cols) a.kept_cols = job->kept_cols.data();
  }
  const int64_t most = std::min(a.kept_row_count, a.kept_col_count);
  a.structural_rank = std::min(most, std::max<int64_t>(flags[0], most > 0));
}

// What the list's matrices have beside their values: each list empty, or one tensor per matrix,
// empty where it has no pattern. The compressed rows are optional.
struct Patterns {
  Tensors masks, structures, row_pointers, columns;
};

// The compressed rows, if given.
bool take_rows(const Patterns& patterns, size_t i, SpectralMatrix* a) {
  const Tensor &pointers = patterns.row_pointers[i], &columns = patterns.columns[i];
  if (pointers.numel() == 0) return false;
  STD_TORCH_CHECK(pointers.numel() == a->rows + 1, kOp, ": expected ", a->rows + 1,
                  " row pointers, got ", pointers.numel());
  a->nnz = columns.numel();
  a->row_begin = pointer_data(kOp, pointers, a->nnz, "row_pointers");
  a->entry_column = bounded_index(kOp, columns, a->nnz, a->cols, "columns");
  return true;
}

// The factorisations walk the mask itself, in room for as many entries as the rows have.
void check_masks(const std::vector<Job>& jobs, const std::vector<size_t>& some) {
  for (const size_t i : some) {
    const SpectralMatrix& a = jobs[i].matrix;
    STD_TORCH_CHECK(a.row_begin == nullptr || count_true(a.mask, a.rows * a.cols) == a.nnz, kOp,
                    ": expected the compressed rows of the mask");
  }
}

// The jobs point into themselves and must not be moved afterwards.
std::vector<Job> make_jobs(const Tensors& matrices, const Patterns& patterns, bool structural,
                           Packing* packing) {
  const Tensors &masks = patterns.masks, &structures = patterns.structures;
  STD_TORCH_CHECK(!matrices.empty(), kOp, ": expected at least one matrix, got an empty list");
  STD_TORCH_CHECK((masks.empty() || masks.size() == matrices.size()) &&
                      (structures.empty() || structures.size() == masks.size()),
                  kOp, ": expected one mask and one structure per matrix");
  STD_TORCH_CHECK((patterns.columns.empty() || patterns.columns.size() == masks.size()) &&
                      patterns.row_pointers.size() == patterns.columns.size(),
                  kOp, ": expected the compressed rows of every mask");
  std::vector<Job> jobs(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& matrix = matrices[i];
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous() && matrix.numel() > 0, kOp,
                    ": expected contiguous matrices with at least one element");
    dispatch_floating(kOp, matrix.scalar_type(), [](auto) {});
    Job& job = jobs[i];
    SpectralMatrix& a = job.matrix;
    a = {};
    a.data = matrix.const_data_ptr();
    a.dtype = static_cast<DType>(matrix.scalar_type());
    a.rows = a.kept_row_count = matrix.size(0);
    a.cols = a.kept_col_count = matrix.size(1);
    a.structural_rank = std::min(a.rows, a.cols);
    if (!masks.empty() && masks[i].numel() > 0) {
      check_same_shape(matrix, masks[i]);
      a.mask = static_cast<const bool*>(masks[i].const_data_ptr());
      if (patterns.columns.empty() || !take_rows(patterns, i, &a)) {
        a.nnz = count_true(a.mask, a.rows * a.cols);
      }
      if (!structures.empty()) keep_live(structures[i], structural, &job);
    }
    job.row_offset = packing->rows;
    job.col_offset = packing->cols;
    job.block_offset = packing->smaller;
    packing->rows += a.rows;
    packing->cols += a.cols;
    packing->smaller += std::min(a.rows, a.cols);
  }
  return jobs;
}

double cost(const SpectralMatrix& a) {
  const double n = static_cast<double>(std::min(a.rows, a.cols));
  return static_cast<double>(a.mask ? a.nnz : a.rows * a.cols) * n + n * n * n;
}

// Calls run(slot) for every slot of a thread.
template <class Run>
void run_slots(size_t slots, const Run& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(slots), 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) run(static_cast<size_t>(slot));
  });
}

// Runs the given jobs longest first. Slot k starts with the k-th job and then takes the next one
// left, so its workspace has to hold that job and the largest of those behind the first round, not
// the largest of all.
template <class Run>
void run_jobs(const std::vector<Job>& jobs, std::vector<size_t> order, const Run& run) {
  if (order.empty()) return;
  const auto workspace_size = TSCNC_SELECT(extreme_singular_values_workspace);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return cost(jobs[a].matrix) > cost(jobs[b].matrix); });
  const size_t slots = std::min<size_t>(torch::stable::get_num_threads(), order.size());
  int64_t largest_behind = 0;
  for (size_t at = slots; at < order.size(); ++at) {
    largest_behind = std::max(largest_behind, workspace_size(jobs[order[at]].matrix));
  }
  std::vector<int64_t> begin(1, 0);
  for (size_t slot = 0; slot < slots; ++slot) {
    const int64_t own = workspace_size(jobs[order[slot]].matrix);
    begin.push_back(begin.back() + std::max(own, largest_behind));
  }
  Tensor workspace = torch::stable::empty({begin.back()}, ScalarType::Double);
  double* base = static_cast<double*>(workspace.mutable_data_ptr());
  std::atomic<size_t> next{slots};
  run_slots(slots, [&](size_t slot) {
    for (size_t at = slot; at < order.size(); at = next++) run(order[at], base + begin[slot]);
  });
}

std::vector<size_t> all_of(const std::vector<Job>& jobs) {
  std::vector<size_t> order(jobs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  return order;
}

// Runs jobs that need little beside their matrices; returns those that `run` was not enough for.
template <class Run>
std::vector<size_t> run_passes(const std::vector<Job>& jobs, const Run& run) {
  const auto workspace_size = TSCNC_SELECT(pass_workspace);
  std::vector<char> done(jobs.size());
  std::atomic<size_t> next{0};
  run_slots(std::min<size_t>(torch::stable::get_num_threads(), jobs.size()), [&](size_t) {
    for (size_t i = next++; i < jobs.size(); i = next++) {
      double* workspace = thread_scratch().reserve<double>(workspace_size(jobs[i].matrix));
      done[i] = run(i, workspace);
    }
  });
  std::vector<size_t> left;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (!done[i]) left.push_back(i);
  }
  return left;
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()),
                              type);
}

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// The values rounded to float32.
Tensor narrowed(Tensor wide, std::initializer_list<int64_t> shape) {
  Tensor narrow = empty(shape, ScalarType::Float);
  const double* from = data<double>(wide);
  float* to = data<float>(narrow);
  for (int64_t i = 0, numel = narrow.numel(); i < numel; ++i) to[i] = static_cast<float>(from[i]);
  return narrow;
}

// A float64 tensor of the values of a float32 or float64 one.
Tensor widened(Tensor given, int64_t numel) {
  const bool wide = given.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(given.numel() == numel && given.is_contiguous() &&
                      (wide || given.scalar_type() == ScalarType::Float),
                  kOp, ": expected the outputs of the forward call");
  if (wide) return given;
  Tensor result = empty({numel}, ScalarType::Double);
  std::copy_n(data<float>(given), numel, data<double>(result));
  return result;
}

// (2, L) sigma, (2, rows) left, (2, cols) right, all float32 unless a matrix is float64; (2 *
// kMaxTies, smaller) block, (4, smaller) state, (L,) rank, (L, 2) residual, (L,) flags, (L, 2)
// ties, (L, 3, 2) bounds, the vectors of all matrices side by side.
using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs extreme_singular_values_cpu(Tensors matrices, Tensors masks, Tensors structures,
                                    Tensors row_pointers, Tensors columns,
                                    std::optional<Tensor> state, bool structural, double tie_tol,
                                    bool power, bool certify, bool largest_only,
                                    bool /* passes: a choice for CUDA */) {
  Packing packing;
  const std::vector<Job> jobs =
      make_jobs(matrices, {masks, structures, row_pointers, columns}, structural, &packing);
  const int64_t count = static_cast<int64_t>(jobs.size());
  const double* warm = nullptr;
  if (state.has_value()) {
    STD_TORCH_CHECK(state->dim() == 2 && state->size(0) == 4 && state->size(1) == packing.smaller &&
                        state->scalar_type() == ScalarType::Double && state->is_contiguous(),
                    kOp, ": expected a contiguous float64 state of shape (4, ", packing.smaller,
                    ")");
    warm = static_cast<const double*>(state->const_data_ptr());
  }
  Tensor sigma = empty({2, count}, ScalarType::Double);
  Tensor left = empty({2, packing.rows}, ScalarType::Double);
  Tensor right = empty({2, packing.cols}, ScalarType::Double);
  Tensor block = empty({2 * kMaxTies, packing.smaller}, ScalarType::Double);
  Tensor next_state = empty({4, packing.smaller}, ScalarType::Double);
  Tensor rank = empty({count}, ScalarType::Long);
  Tensor residual = empty({count, 2}, ScalarType::Double);
  Tensor flags = empty({count}, ScalarType::Long);
  Tensor ties = empty({count, 2}, ScalarType::Long);
  Tensor bounds = empty({certify ? count : 0, 3, 2}, ScalarType::Double);
  const SpectralOptions options = {tie_tol, power, certify, largest_only};
  const auto result_of = [&](size_t i) {
    SpectralResult result = {};
    for (int end = 0; end < 2; ++end) {
      result.left[end] = data<double>(left) + end * packing.rows + jobs[i].row_offset;
      result.right[end] = data<double>(right) + end * packing.cols + jobs[i].col_offset;
    }
    result.block = data<double>(block) + jobs[i].block_offset;
    result.state = data<double>(next_state) + jobs[i].block_offset;
    result.block_stride = packing.smaller;
    return result;
  };
  const auto start_of = [&](size_t i) { return warm ? warm + jobs[i].block_offset : nullptr; };
  const auto write = [&](size_t i, const SpectralResult& result) {
    data<int64_t>(rank)[i] = result.rank;
    data<int64_t>(flags)[i] = result.flags;
    for (int end = 0; end < 2; ++end) {
      data<double>(sigma)[end * count + i] = result.sigma[end];
      data<double>(residual)[2 * i + end] = result.residual[end];
      data<int64_t>(ties)[2 * i + end] = result.ties[end];
    }
    if (certify) std::copy_n(result.bounds, 6, data<double>(bounds) + 6 * i);
  };
  std::vector<size_t> left_over = all_of(jobs);
  if (warm || largest_only) {
    const auto passes = TSCNC_SELECT(solve_by_passes);
    left_over = run_passes(jobs, [&](size_t i, double* workspace) {
      SpectralResult result = result_of(i);
      const bool solved =
          passes(jobs[i].matrix, options, start_of(i), packing.smaller, workspace, &result);
      if (solved) write(i, result);
      return solved;
    });
  }
  check_masks(jobs, left_over);
  const auto factorisations = TSCNC_SELECT(extreme_singular_values);
  run_jobs(jobs, std::move(left_over), [&](size_t i, double* workspace) {
    SpectralResult result = result_of(i);
    factorisations(jobs[i].matrix, options, start_of(i), packing.smaller, workspace, &result);
    write(i, result);
  });
  if (std::none_of(matrices.begin(), matrices.end(), is_double)) {
    sigma = narrowed(sigma, {2, count});
    left = narrowed(left, {2, packing.rows});
    right = narrowed(right, {2, packing.cols});
  }
  return {sigma, left, right, block, next_state, rank, residual, flags, ties, bounds};
}

void check_numel(const Tensor& tensor, int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(tensor.numel() == numel && tensor.scalar_type() == type && tensor.is_contiguous(),
                  kOp, ": expected the outputs of the forward call");
}

Tensors extreme_singular_values_backward_cpu(Tensor grad_sigma, Tensors matrices, Tensors masks,
                                             Tensor sigma, Tensor left, Tensor right, Tensor block,
                                             Tensor ties) {
  Packing packing;
  const std::vector<Job> jobs = make_jobs(matrices, {masks, {}, {}, {}}, false, &packing);
  const int64_t count = static_cast<int64_t>(jobs.size());
  grad_sigma = widened(grad_sigma, 2 * count);
  sigma = widened(sigma, 2 * count);
  left = widened(left, 2 * packing.rows);
  right = widened(right, 2 * packing.cols);
  check_numel(block, 2 * kMaxTies * packing.smaller, ScalarType::Double);
  check_numel(ties, 2 * count, ScalarType::Long);
  Tensors gradients;
  for (const Tensor& matrix : matrices) gradients.push_back(torch::stable::empty_like(matrix));
  const auto kernel = TSCNC_SELECT(extreme_singular_values_backward);
  run_jobs(jobs, all_of(jobs), [&](size_t i, double* workspace) {
    const Job& job = jobs[i];
    SpectralResult result = {};
    double grad[2];
    for (int end = 0; end < 2; ++end) {
      grad[end] = data<double>(grad_sigma)[end * count + i];
      result.sigma[end] = data<double>(sigma)[end * count + i];
      result.ties[end] = std::clamp<int64_t>(data<int64_t>(ties)[2 * i + end], 1, kMaxTies);
      result.left[end] = data<double>(left) + end * packing.rows + job.row_offset;
      result.right[end] = data<double>(right) + end * packing.cols + job.col_offset;
    }
    result.block = data<double>(block) + job.block_offset;
    result.block_stride = packing.smaller;
    kernel(job.matrix, result, grad, workspace, gradients[i].mutable_data_ptr());
  });
  return gradients;
}

}  // namespace
}  // namespace tscnc

STABLE_TORCH_LIBRARY_FRAGMENT(tscnc_kernels, m) {
  m.def(
      "extreme_singular_values(Tensor[] matrices, Tensor[] masks, Tensor[] structures, "
      "Tensor[] row_pointers, Tensor[] columns, Tensor? state, bool structural, float tie_tol, "
      "bool power, bool certify, bool largest_only, bool passes=False) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "extreme_singular_values_backward(Tensor grad_sigma, Tensor[] matrices, Tensor[] masks, "
      "Tensor sigma, Tensor left, Tensor right, Tensor block, Tensor ties) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(tscnc_kernels, CPU, m) {
  m.impl("extreme_singular_values", TORCH_BOX(&tscnc::extreme_singular_values_cpu));
  m.impl("extreme_singular_values_backward",
         TORCH_BOX(&tscnc::extreme_singular_values_backward_cpu));
}
