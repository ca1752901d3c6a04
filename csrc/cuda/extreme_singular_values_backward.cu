// The gradient of both extreme singular values of many matrices of any size: u v' of each end, or
// its mean over the vectors tied with it, at the kept positions.
//
// Bound: device memory, one store per element. Nothing larger than a vector is kept beside it.
#include "extreme_singular_values.h"
#include "launch.cuh"
#include "spectral_matrix.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kEnds = 2;
// Rows and columns of the gradient that one block writes.
constexpr int kRows = 8, kCols = 4 * kSpectralThreads;

// The images of the tied vectors of both ends.
__host__ __device__ int64_t workspace_of(const SpectralJob& job) {
  return kEnds * kTiedRows * larger_side(job);
}

struct BackwardCall {
  SpectralResults results;
  double* workspace;
};

// The gradients travel beside their jobs, which leaves room for fewer of both.
constexpr int kMaxTargets = 32;
struct GradientTargets {
  void* gradients[kMaxTargets];
};

// One end of one matrix.
struct End {
  double grad;
  int ties;
  const double *left, *right, *block;
  double* images;  // of the tied vectors, on the long side

  __device__ End(const BackwardCall& call, const SpectralPlace& place, const SpectralJob& job,
                 int end) {
    const SpectralResults& results = call.results;
    const double sigma = results.sigma[end * results.count + place.index];
    // The left vector of a vanishing singular value is zero, and so is its gradient.
    grad = sigma == 0 ? 0 : results.grad_sigma[end * results.count + place.index];
    ties = int(results.ties[2 * place.index + end]);
    ties = ties < 1 ? 1 : ties > kTiedRows ? kTiedRows : ties;
    left = results.left + end * results.rows + place.row;
    right = results.right + end * results.cols + place.col;
    block = results.block + end * kTiedRows * results.smaller + place.smaller;
    images = call.workspace + place.workspace + end * kTiedRows * larger_side(job);
  }
};

// A v / |A v| of one tied vector; the vectors of a simple singular value are known.
__global__ void __launch_bounds__(kSpectralThreads, 2)
    image_kernel(const __grid_constant__ SpectralTable table,
                 const __grid_constant__ BackwardCall call) {
  __shared__ double length;
  const SpectralPlace place = place_of(table, blockIdx.y, workspace_of);
  const SpectralJob& job = table.jobs[blockIdx.y];
  const End end(call, place, job, blockIdx.x / kTiedRows);
  const int row = blockIdx.x % kTiedRows;
  if (end.ties == 1 || row >= end.ties || end.grad == 0) return;
  const int64_t m = larger_side(job);
  const double* vector = end.block + row * call.results.smaller;
  double* image = end.images + row * m;
  if (job.rows < job.cols) {
    multiply_columns<1>(job, 1, vector, 0, image, 0);
  } else {
    multiply_rows<1>(job, 1, vector, 0, image, 0);
  }
  __syncthreads();
  double squares = 0;
  for (int64_t i = threadIdx.x; i < m; i += kSpectralThreads) squares += image[i] * image[i];
  squares = block_sum<kSpectralThreads>(squares);
  if (threadIdx.x == 0) length = sqrt(squares);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < m; i += kSpectralThreads) image[i] /= length;
}

// sum[i] += weight * left[row + i] * right[col], for the rows that there are.
__device__ __forceinline__ void add_term(double weight, const double* left, double right,
                                         int64_t count, double (&sum)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i < count) sum[i] += weight * left[i] * right;
  }
}

__device__ __forceinline__ void add_end(const End& end, const SpectralJob& job,
                                        int64_t block_stride, int64_t row, int64_t col,
                                        double (&sum)[kRows]) {
  if (end.grad == 0) return;
  const int64_t count = job.rows - row;
  if (end.ties == 1) return add_term(end.grad, end.left + row, end.right[col], count, sum);
  const bool wide = job.rows < job.cols;
  for (int k = 0; k < end.ties; ++k) {
    const double* vector = end.block + k * block_stride;
    const double* image = end.images + k * larger_side(job);
    const double *left = wide ? vector : image, *right = wide ? image : vector;
    add_term(end.grad / end.ties, left + row, right[col], count, sum);
  }
}

__global__ void __launch_bounds__(kSpectralThreads, 2)
    gradient_kernel(const __grid_constant__ SpectralTable table,
                    const __grid_constant__ GradientTargets targets,
                    const __grid_constant__ BackwardCall call) {
  const SpectralJob& job = table.jobs[blockIdx.y];
  const int64_t row_blocks = (job.rows + kRows - 1) / kRows;
  const int64_t row = blockIdx.x % row_blocks * kRows, first = blockIdx.x / row_blocks * kCols;
  if (first >= job.cols) return;
  const SpectralPlace place = place_of(table, blockIdx.y, workspace_of);
  const End largest(call, place, job, 0), smallest(call, place, job, 1);
  const int64_t last = first + kCols < job.cols ? first + kCols : job.cols;
  for (int64_t col = first + threadIdx.x; col < last; col += kSpectralThreads) {
    double sum[kRows] = {};
    add_end(largest, job, call.results.smaller, row, col, sum);
    add_end(smallest, job, call.results.smaller, row, col, sum);
    with_storage(job.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      Storage* gradient = static_cast<Storage*>(targets.gradients[blockIdx.y]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * job.cols + col;
        if (row + i >= job.rows) break;
        const bool is_kept = job.mask == nullptr || job.mask[at];
        gradient[at] = Storage(is_kept ? Math<Storage>(sum[i]) : Math<Storage>(0));
      }
    });
  }
}

int64_t blocks_of(const SpectralJob& job) {
  return int64_t((job.rows + kRows - 1) / kRows) * ((job.cols + kCols - 1) / kCols);
}

cudaError_t launch_table(const SpectralTable& table, const GradientTargets& targets,
                         const BackwardCall& call, cudaStream_t stream) {
  const unsigned count = unsigned(table.count);
  int64_t blocks = 0;
  for (int i = 0; i < table.count; ++i) blocks = std::max(blocks, blocks_of(table.jobs[i]));
  const cudaError_t error = launch(image_kernel, dim3(kEnds * kTiedRows, count),
                                   dim3(kSpectralThreads), 0, stream, table, call);
  if (error != cudaSuccess) return error;
  return launch(gradient_kernel, dim3(unsigned(blocks), count), dim3(kSpectralThreads), 0, stream,
                table, targets, call);
}

}  // namespace

int64_t extreme_singular_values_backward_workspace(const SpectralJob* jobs, int64_t count) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) size += workspace_of(jobs[i]);
  return size;
}

cudaError_t launch_extreme_singular_values_backward(const SpectralJob* jobs,
                                                    const SpectralResults& results,
                                                    void* const* gradients, double* workspace,
                                                    cudaStream_t stream) {
  const BackwardCall call = {results, workspace};
  return for_each_table<kMaxTargets>(jobs, results.count, workspace_of,
                                     [&](const SpectralTable& table) {
                                       GradientTargets targets = {};
                                       for (int i = 0; i < table.count; ++i) {
                                         targets.gradients[i] = gradients[table.first.index + i];
                                       }
                                       return launch_table(table, targets, call, stream);
                                     });
}

}  // namespace tscnc::cuda
