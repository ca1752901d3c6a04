// Products of a sparse matrix with up to 16 samples at a time, and the gradient of its kept
// entries.
//
// Bound: device memory. Every kept entry is read once, in order, 4 bytes of index (half of that for
// half types) and its value; all features of the samples are in shared memory, side by side for
// every feature.
#include <algorithm>
#include <iterator>
#include <type_traits>

#include "launch.cuh"
#include "masked_linear.h"
#include "pack.cuh"
#include "sample_tile.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kMostLanes = 16;
// Entries that a thread takes at once: as many columns as one 128-bit load moves.
template <typename Column>
constexpr int kTaken = 16 / sizeof(Column);
// A warp works on a row from this mean of kept entries on, else a quarter of one.
constexpr int64_t kLongRow = 128;
constexpr int kShortTeam = 8;

// One feature of all samples of a tile.
template <typename Storage, int kLanes>
struct alignas(kLanes * sizeof(Storage) < 16 ? kLanes * sizeof(Storage) : 16) Lanes {
  Storage elements[kLanes];
};

template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Several {
  T elements[kCount];
};

// Entries [kCount group, kCount (group + 1)) of an array; those from `count` on are left as they
// are.
template <typename T, int kCount>
__device__ __forceinline__ void load_group(const T* data, int32_t group, int64_t count,
                                           Several<T, kCount>& entries) {
  const T* source = data + int64_t(group) * kCount;
  if (reinterpret_cast<uintptr_t>(source) % alignof(Several<T, kCount>) == 0 &&
      int64_t(group) * kCount + kCount <= count) {
    entries = *reinterpret_cast<const Several<T, kCount>*>(source);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (int64_t(group) * kCount + i < count) entries.elements[i] = source[i];
  }
}

// The values of a group of which entries [begin, end) are wanted.
template <typename Storage, typename Column, int kCount>
__device__ __forceinline__ void load_values(const KeptValues& values, int64_t row,
                                            const Several<Column, kCount>& columns, int32_t group,
                                            int32_t begin, int32_t end, int64_t kept,
                                            Several<Storage, kCount>& wanted) {
  const auto* data = static_cast<const Storage*>(values.data);
  if (!values.is_dense && values.permutation == nullptr) {
    load_group(data, group, kept, wanted);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t entry = group * kCount + i;
    if (entry < begin || entry >= end) continue;
    const int64_t place = values.is_dense
                              ? row * values.row_stride + columns.elements[i] * values.column_stride
                              : int64_t(values.permutation[entry]);
    wanted.elements[i] = data[place];
  }
}

// All features of kLanes samples, zero beyond the last one. The caller synchronises.
template <int kLanes, typename Storage>
__device__ __forceinline__ void stage_lanes(Lanes<Storage, kLanes>* tile,
                                            const Samples<Storage>& samples, int64_t first_sample) {
  for (int64_t feature = threadIdx.x; feature < samples.width; feature += kThreads) {
    Lanes<Storage, kLanes> lanes;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.elements[lane] = load_sample(samples, first_sample + lane, feature);
    }
    tile[feature] = lanes;
  }
}

template <typename Storage, typename Column>
struct ProductArguments {
  Samples<Storage> input;
  KeptEntries entries;
  const Column* columns;
  KeptValues values;
  const Storage* bias;
  Activation activation;
  Storage* output;
  Storage* preactivation;
};

// Rows go to teams of threads in turn; a row's entries go to the threads of its team in turn, whose
// sums are added up by shuffles. blockIdx.y: the tile of samples.
template <typename Storage, typename Column, int kLanes, int kTeam>
__global__ void __launch_bounds__(kThreads)
    small_product_kernel(const __grid_constant__ ProductArguments<Storage, Column> call) {
  using T = Math<Storage>;
  constexpr int kCount = kTaken<Column>;
  auto* tile = dynamic_shared<Lanes<Storage, kLanes>>();
  const int64_t first_sample = int64_t(blockIdx.y) * kLanes;
  stage_lanes<kLanes>(tile, call.input, first_sample);
  __syncthreads();
  const int member = threadIdx.x % kTeam;
  const int64_t teams = int64_t(gridDim.x) * (kThreads / kTeam);
  const int64_t first_row = int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  const unsigned mask =
      kTeam == 32 ? 0xffffffffu : ((1u << kTeam % 32) - 1) << (threadIdx.x % 32 / kTeam * kTeam);
#pragma unroll 1
  for (int64_t row = first_row; row < call.entries.rows; row += teams) {
    const int32_t begin = call.entries.pointers[row];
    const int32_t end = call.entries.pointers[row + 1];
    T sums[kLanes] = {};
#pragma unroll 1
    for (int32_t group = begin / kCount + member; group * int64_t(kCount) < end; group += kTeam) {
      Several<Column, kCount> columns = {};
      Several<Storage, kCount> values = {};
      load_group(call.columns, group, call.entries.kept, columns);
      load_values(call.values, row, columns, group, begin, end, call.entries.kept, values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int32_t entry = group * kCount + i;
        if (entry < begin || entry >= end) continue;
        const Lanes<Storage, kLanes> samples = tile[columns.elements[i]];
        const T value = static_cast<T>(values.elements[i]);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          sums[lane] += value * static_cast<T>(samples.elements[lane]);
        }
      }
    }
    const T bias = call.bias != nullptr ? static_cast<T>(call.bias[row]) : T(0);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      T z = sums[lane];
#pragma unroll
      for (int offset = kTeam / 2; offset > 0; offset /= 2) z += __shfl_xor_sync(mask, z, offset);
      const int64_t sample = first_sample + lane;
      if (member != lane % kTeam || sample >= call.input.count) continue;
      z += bias;
      const int64_t place = sample * call.entries.rows + row;
      if (call.preactivation != nullptr) call.preactivation[place] = Storage(z);
      call.output[place] = Storage(activate(z, call.activation));
    }
  }
}

template <typename Storage>
struct GradientArguments {
  Samples<Storage> input, gradient;
  KeptEntries entries;
  bool is_dense;
  Storage* result;
};

// The row's gradient is in registers; every thread of its team takes the next entry.
template <typename Storage, int kLanes>
__global__ void __launch_bounds__(kThreads)
    small_weight_gradient_kernel(const __grid_constant__ GradientArguments<Storage> call) {
  using T = Math<Storage>;
  constexpr int kTeam = 32;
  auto* tile = dynamic_shared<Lanes<Storage, kLanes>>();
  stage_lanes<kLanes>(tile, call.input, 0);
  __syncthreads();
  const int64_t teams = int64_t(gridDim.x) * (kThreads / kTeam);
  const int64_t first_row = int64_t(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
#pragma unroll 1
  for (int64_t row = first_row; row < call.entries.rows; row += teams) {
    const int32_t end = call.entries.pointers[row + 1];
    int32_t entry = call.entries.pointers[row] + int32_t(threadIdx.x % kTeam);
    if (entry >= end) continue;
    T gradient[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = static_cast<T>(load_sample(call.gradient, lane, row));
    }
#pragma unroll 2
    for (; entry < end; entry += kTeam) {
      const int32_t column = call.entries.columns[entry];
      const Lanes<Storage, kLanes> samples = tile[column];
      T sum = 0;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sum += gradient[lane] * static_cast<T>(samples.elements[lane]);
      }
      call.result[call.is_dense ? row * call.entries.width + column : entry] = Storage(sum);
    }
  }
}

// Numbers of samples that kernels are built for.
constexpr int kLaneCounts[] = {1, 4, 8, kMostLanes};

// The smallest of them that holds all samples, or the largest of which all features fit into shared
// memory; 0 if not even one sample does.
int fitting_lanes(int64_t count, int64_t width, int64_t element_bytes, int64_t shared_bytes) {
  int fitting = 0;
  for (const int lanes : kLaneCounts) {
    if (lanes * width * element_bytes > shared_bytes) break;
    fitting = lanes;
    if (lanes >= count) break;
  }
  return fitting;
}

int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

int fitting_lanes(const SampleMatrix& input, DType dtype) {
  DeviceLimits limits;
  if (device_limits(&limits) != cudaSuccess) return 0;
  return fitting_lanes(input.count, input.width, size_of(dtype), limits.shared_bytes);
}

// CTAs for teams of `team` threads that take `rows` rows in turn: every CTA fills its own tile, so
// there are no more than run at once.
unsigned blocks_for(int64_t rows, int team, int64_t shared_bytes, const DeviceLimits& limits) {
  const int64_t resident = std::clamp<int64_t>(
      shared_bytes > 0 ? limits.shared_bytes / shared_bytes : 1, 1, 2048 / kThreads);
  const int64_t needed = (rows * team + kThreads - 1) / kThreads;
  return unsigned(std::clamp<int64_t>(needed, 1, resident * limits.processors));
}

// Calls function(std::integral_constant<int, lanes>) for one of kLaneCounts.
template <size_t kIndex = 0, typename Function>
cudaError_t with_lanes(int lanes, Function function) {
  if constexpr (kIndex < std::size(kLaneCounts)) {
    constexpr int kLanes = kLaneCounts[kIndex];
    if (lanes == kLanes) return function(std::integral_constant<int, kLanes>());
    return with_lanes<kIndex + 1>(lanes, function);
  }
  return cudaErrorInvalidValue;
}

template <typename Storage, typename Column>
cudaError_t launch_product(const ProductCall& call, const Column* columns,
                           const DeviceLimits& limits, cudaStream_t stream) {
  const ProductArguments<Storage, Column> arguments = {samples_of<Storage>(call.input),
                                                       call.entries,
                                                       columns,
                                                       call.values,
                                                       static_cast<const Storage*>(call.bias),
                                                       call.activation,
                                                       static_cast<Storage*>(call.output),
                                                       static_cast<Storage*>(call.preactivation)};
  const bool is_long = call.entries.kept >= kLongRow * call.entries.rows;
  return with_lanes(fitting_lanes(call.input, call.dtype), [&](auto width) {
    constexpr int kLanes = decltype(width)::value;
    const int team = is_long ? 32 : kShortTeam;
    const int64_t shared = call.input.width * int64_t(sizeof(Lanes<Storage, kLanes>));
    const auto tiles = unsigned((call.input.count + kLanes - 1) / kLanes);
    const auto kernel = is_long ? small_product_kernel<Storage, Column, kLanes, 32>
                                : small_product_kernel<Storage, Column, kLanes, kShortTeam>;
    return launch(kernel, dim3(blocks_for(call.entries.rows, team, shared, limits), tiles),
                  dim3(kThreads), size_t(shared), stream, arguments);
  });
}

}  // namespace

bool small_product_fits(const ProductCall& call) {
  return fitting_lanes(call.input, call.dtype) > 0;
}

cudaError_t launch_small_product(const ProductCall& call, cudaStream_t stream) {
  if (call.input.count == 0 || call.entries.rows == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if constexpr (sizeof(Storage) == 2) {
      if (call.narrow_columns != nullptr) {
        return launch_product<Storage>(call, call.narrow_columns, limits, stream);
      }
    }
    return launch_product<Storage>(call, call.entries.columns, limits, stream);
  });
}

bool small_weight_gradient_fits(const WeightGradientCall& call) {
  return fitting_lanes(call.input, call.dtype) >= call.input.count;
}

cudaError_t launch_small_weight_gradient(const WeightGradientCall& call, cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const KeptEntries& entries = call.entries;
  if (call.is_dense) {
    const auto bytes = size_t(entries.rows * entries.width * size_of(call.dtype));
    error = cudaMemsetAsync(call.result, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  if (entries.kept == 0) return cudaSuccess;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const GradientArguments<Storage> arguments = {
        samples_of<Storage>(call.input), samples_of<Storage>(call.gradient), entries, call.is_dense,
        static_cast<Storage*>(call.result)};
    return with_lanes(fitting_lanes(call.input, call.dtype), [&](auto width) {
      constexpr int kLanes = decltype(width)::value;
      const int64_t shared = entries.width * int64_t(sizeof(Lanes<Storage, kLanes>));
      return launch(small_weight_gradient_kernel<Storage, kLanes>,
                    dim3(blocks_for(entries.rows, 32, shared, limits)), dim3(kThreads),
                    size_t(shared), stream, arguments);
    });
  });
}

}  // namespace tscnc::cuda
