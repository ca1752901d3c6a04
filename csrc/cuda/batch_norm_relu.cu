// Batch normalisation and ReLU: sums over each channel, then a pass over all entries. Bound: device
// memory.
#include "batch_norm_relu.h"

#include <cmath>

#include "batch_norm_sums.cuh"
#include "launch.cuh"
#include "pack.cuh"

namespace tscnc::cuda {

namespace {

// Of a column, over all slices.
template <typename Storage>
__device__ __forceinline__ Sums column_sums(const Arguments<Storage>& given, int64_t column) {
  Sums total = {};
  for (int64_t slice = 0; slice < given.plan.slices; ++slice) {
    const Sums& part = given.partial[slice * given.plan.columns + column];
    total.first += part.first;
    total.second += part.second;
  }
  return total;
}

// Mean and variance of each channel from its columns (Chan, Golub, LeVeque), and its constants; a
// thread per channel.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const __grid_constant__ Arguments<Storage> given, bool is_given, double* mean,
                      double* variance) {
  using S = Math<Storage>;
  const BatchNormCall& call = given.call;
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= call.channels) return;
  if (!is_given) {
    const int64_t each = given.plan.planes ? 1 : call.length;
    const double count = double(given.plan.planes ? call.outer * call.length : call.outer);
    double center = 0, squares = 0, before = 0;
    for (int64_t column = channel * each; count > 0 && column < (channel + 1) * each; ++column) {
      const Sums sums = column_sums(given, column);
      const double offset = sums.first / count;
      const double distance = given.shifts[column] + offset - center;
      const double all = before + count;
      squares += sums.second - sums.first * offset + distance * distance * (before * count / all);
      center += distance * (count / all);
      before = all;
    }
    mean[channel] = center;
    variance[channel] = before > 0 ? squares / before : 0;
  }
  const double exact = mean[channel];
  const double weight = call.weight != nullptr ? call.weight[channel] : 1;
  const double scale = weight / sqrt(variance[channel] + call.eps);
  const S center = S(exact);
  given.constants.center[channel] = center;
  given.constants.scale[channel] = S(scale);
  const double bias = call.bias != nullptr ? call.bias[channel] : 0;
  given.constants.offset[channel] = S(bias - (exact - double(center)) * scale);
}

// The gradients of weight and bias, and what the statistics add to that of the input; a thread per
// channel.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    affine_gradient_kernel(const __grid_constant__ Arguments<Storage> given, const double* mean,
                           const double* variance, bool training, double* grad_weight,
                           double* grad_bias) {
  using S = Math<Storage>;
  const BatchNormCall& call = given.call;
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= call.channels) return;
  const int64_t each = given.plan.planes ? 1 : call.length;
  const double count = double(call.outer * call.length);
  Sums sums = {};
  for (int64_t column = channel * each; count > 0 && column < (channel + 1) * each; ++column) {
    const Sums found = column_sums(given, column);
    sums.first += found.first;
    sums.second += found.second;
  }
  // The sum of products with x - center becomes one with x - mean.
  const double rest = mean[channel] - double(S(mean[channel]));
  sums.second -= rest * sums.first;
  const double squared = variance[channel] + call.eps;
  if (grad_weight != nullptr) grad_weight[channel] = sums.second / sqrt(squared);
  if (grad_bias != nullptr) grad_bias[channel] = sums.first;
  const double weight = call.weight != nullptr ? call.weight[channel] : 1;
  const double scale = training && count > 0 ? weight / sqrt(squared) / count : 0;
  const double slope = scale * sums.second / squared;
  given.constants.slope[channel] = S(slope);
  given.constants.level[channel] = S(slope * rest - scale * sums.first);
}

// A pack per thread: the output, or the gradient of the input. `Index` holds the number of entries.
template <typename Storage, bool kGradient, typename Index>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ Arguments<Storage> given, Storage* result) {
  using S = Math<Storage>;
  constexpr int kSize = kPackSize<Storage>;
  const BatchNormCall& call = given.call;
  const Constants<S>& of = given.constants;
  const auto length = Index(call.length), channels = Index(call.channels);
  const auto count = Index(call.outer * call.channels * call.length);
  const Index begin = (Index(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (begin >= count) return;
  const bool whole = count - begin >= kSize && is_aligned_for_packs(given.input) &&
                     is_aligned_for_packs(result) &&
                     (!kGradient || is_aligned_for_packs(given.gradient));
  Pack<Storage> x, g, y;
  if (whole) {
    x = *reinterpret_cast<const Pack<Storage>*>(given.input + begin);
    if constexpr (kGradient) g = *reinterpret_cast<const Pack<Storage>*>(given.gradient + begin);
  }
  const Index plane = begin / length;
  Index channel = plane % channels, place = begin - plane * length;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!whole && begin + i >= count) break;
    if (!whole) {
      x.elements[i] = given.input[begin + i];
      if constexpr (kGradient) g.elements[i] = given.gradient[begin + i];
    }
    const S deviation = static_cast<S>(x.elements[i]) - of.center[channel];
    const S scale = of.scale[channel], offset = of.offset[channel];
    S value;
    if constexpr (kGradient) {
      const S passed = through(static_cast<S>(g.elements[i]), deviation, scale, offset, call.relu);
      value = scale * passed + (of.level[channel] - of.slope[channel] * deviation);
    } else {
      const S z = deviation * scale + offset;
      value = call.relu && z < 0 ? S(0) : z;
    }
    y.elements[i] = static_cast<Storage>(value);
    if (!whole) result[begin + i] = y.elements[i];
    if (++place == length) {
      place = 0;
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
  if (whole) *reinterpret_cast<Pack<Storage>*>(result + begin) = y;
}

template <typename Storage>
Arguments<Storage> arguments_of(const BatchNormCall& call, const void* input, const void* gradient,
                                void* workspace) {
  const Plan plan = plan_of(call);
  auto* partial = static_cast<unsigned char*>(workspace) + plan.constant_bytes(call);
  auto* shifts = partial + plan.slices * plan.columns * int64_t(sizeof(Sums));
  return {call,
          plan,
          Constants<Math<Storage>>(workspace, call.channels),
          static_cast<const Storage*>(input),
          static_cast<const Storage*>(gradient),
          reinterpret_cast<double*>(shifts),
          reinterpret_cast<Sums*>(partial)};
}

template <typename Storage, bool kGradient>
cudaError_t launch_apply(const Arguments<Storage>& given, void* result, cudaStream_t stream) {
  const int64_t count = given.call.outer * given.call.channels * given.call.length;
  if (count == 0) return cudaSuccess;
  constexpr int64_t kEach = kThreads * kPackSize<Storage>;
  const dim3 grid(blocks_of(count, kEach));
  const bool is_small = count <= (int64_t(1) << 32) - kEach - 1;
  return launch(is_small ? apply_kernel<Storage, kGradient, uint32_t>
                         : apply_kernel<Storage, kGradient, uint64_t>,
                grid, dim3(kThreads), 0, stream, given, static_cast<Storage*>(result));
}

}  // namespace

int64_t batch_norm_workspace(const BatchNormCall& call) { return plan_of(call).bytes(call); }

cudaError_t launch_batch_norm(const BatchNormCall& call, const void* input, bool is_given,
                              double* mean, double* variance, void* output, void* workspace,
                              cudaStream_t stream) {
  if (call.channels == 0) return cudaSuccess;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto given = arguments_of<Storage>(call, input, nullptr, workspace);
    cudaError_t error = is_given ? cudaSuccess : launch_sums<Storage, false>(given, stream);
    if (error != cudaSuccess) return error;
    error = launch(statistics_kernel<Storage>, dim3(blocks_of(call.channels, kThreads)),
                   dim3(kThreads), 0, stream, given, is_given, mean, variance);
    if (error != cudaSuccess) return error;
    return launch_apply<Storage, false>(given, output, stream);
  });
}

cudaError_t launch_batch_norm_backward(const BatchNormCall& call, const void* grad_output,
                                       const void* input, const double* mean,
                                       const double* variance, bool training, void* grad_input,
                                       double* grad_weight, double* grad_bias, void* workspace,
                                       cudaStream_t stream) {
  if (call.channels == 0) return cudaSuccess;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto given = arguments_of<Storage>(call, input, grad_output, workspace);
    const dim3 grid(blocks_of(call.channels, kThreads));
    cudaError_t error = launch(statistics_kernel<Storage>, grid, dim3(kThreads), 0, stream, given,
                               true, const_cast<double*>(mean), const_cast<double*>(variance));
    if (error != cudaSuccess) return error;
    error = launch_sums<Storage, true>(given, stream);
    if (error != cudaSuccess) return error;
    error = launch(affine_gradient_kernel<Storage>, grid, dim3(kThreads), 0, stream, given, mean,
                   variance, training, grad_weight, grad_bias);
    if (error != cudaSuccess || grad_input == nullptr) return error;
    return launch_apply<Storage, true>(given, grad_input, stream);
  });
}

}  // namespace tscnc::cuda
