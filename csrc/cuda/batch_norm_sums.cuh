// Sums over the channels of batch_norm_relu: statistics of the input, or of its gradient.
//
// Long planes are summed by blocks that have one channel each. Short ones are columns of a matrix,
// of which neighbouring threads have neighbouring ones. Sums are taken about a mean of the first
// entries, in float, and joined in double.
#pragma once

#include <algorithm>

#include "batch_norm_relu.h"
#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;
// Entries of a plane from which on its channel has blocks of its own.
constexpr int64_t kPlaneLength = 32;
// Entries of a channel, or rows, that are worth a slice, and the most slices.
constexpr int64_t kSliceEntries = 8192, kSliceRows = 256, kMostSlices = 128;
// Columns of a block of the row form, and threads that share each.
constexpr int kColumns = kWarpSize;
constexpr int kSharing = kThreads / kColumns;
// Rows whose mean the sums of a column are taken about.
constexpr int64_t kFirstRows = 32;

struct Sums {
  double first, second;
};

// How the sums are cut; it depends on the shape alone.
struct Plan {
  bool planes;
  int64_t columns, slices;  // columns: channels, or channels * length

  int64_t constant_bytes(const BatchNormCall& call) const { return 5 * call.channels * 8; }
  int64_t bytes(const BatchNormCall& call) const {
    return constant_bytes(call) + (slices * int64_t(sizeof(Sums)) + 8) * columns;
  }
};

Plan plan_of(const BatchNormCall& call) {
  Plan plan = {};
  plan.planes = call.length >= kPlaneLength;
  plan.columns = plan.planes ? call.channels : call.channels * call.length;
  const int64_t wanted =
      plan.planes ? call.outer * call.length / kSliceEntries : call.outer / kSliceRows;
  plan.slices = std::clamp<int64_t>(wanted, 1, kMostSlices);
  return plan;
}

// The formulas of each channel in the arithmetic type. `center` is the rounded mean, the rest of
// which goes into the other constants.
template <typename S>
struct Constants {
  S *center, *scale, *offset, *slope, *level;

  Constants(void* memory, int64_t channels) {
    center = static_cast<S*>(memory);
    scale = center + channels;
    offset = scale + channels;
    slope = offset + channels;
    level = slope + channels;
  }
};

template <typename Storage>
struct Arguments {
  using S = Math<Storage>;
  BatchNormCall call;
  Plan plan;
  Constants<S> constants;
  const Storage* input;
  const Storage* gradient;  // of the output, or null for the statistics
  double* shifts;           // (columns,)
  Sums* partial;            // (slices, columns)
};

// The gradient of the normalised and scaled entry.
template <typename S>
__device__ __forceinline__ S through(S gradient, S deviation, S scale, S offset, bool relu) {
  return relu && deviation * scale + offset <= 0 ? S(0) : gradient;
}

// Adds an entry: its deviation and the square, or its gradient and the product of both.
template <typename Storage, bool kGradient>
__device__ __forceinline__ void add_entry(const Arguments<Storage>& given, int64_t place,
                                          int64_t channel, Math<Storage> shift,
                                          Math<Storage>& first, Math<Storage>& second) {
  using S = Math<Storage>;
  const S deviation = static_cast<S>(given.input[place]) - shift;
  S factor = deviation;
  if constexpr (kGradient) {
    factor =
        through(static_cast<S>(given.gradient[place]), deviation, given.constants.scale[channel],
                given.constants.offset[channel], given.call.relu);
  }
  first += factor;
  second += factor * deviation;
}

// Walks over a channel's entries, kThreads at a time.
struct Entry {
  int64_t outer, place;

  __device__ __forceinline__ Entry(int64_t index, int64_t length)
      : outer(index / length), place(index - outer * length) {}
  __device__ __forceinline__ void move_on(const Entry& step, int64_t length) {
    place += step.place;
    const bool wraps = place >= length;
    place -= wraps ? length : 0;
    outer += step.outer + int(wraps);
  }
};

// blockIdx.x: the channel; blockIdx.y: the slice of its entries.
template <typename Storage, bool kGradient>
__global__ void __launch_bounds__(kThreads)
    plane_sums_kernel(const __grid_constant__ Arguments<Storage> given) {
  using S = Math<Storage>;
  const BatchNormCall& call = given.call;
  const int64_t channel = blockIdx.x, count = call.outer * call.length;
  const int64_t begin = count * blockIdx.y / gridDim.y, end = count * (blockIdx.y + 1) / gridDim.y;
  const auto place_of = [&](const Entry& entry) {
    return (entry.outer * call.channels + channel) * call.length + entry.place;
  };
  __shared__ double shared_shift;
  S shift;
  if constexpr (kGradient) {
    shift = given.constants.center[channel];
  } else {
    const int64_t seen = count < kThreads ? count : kThreads;
    S own = 0;
    if (threadIdx.x < seen) own = static_cast<S>(given.input[place_of({threadIdx.x, call.length})]);
    const double sum = block_sum<kThreads>(double(own));
    if (threadIdx.x == 0) {
      shared_shift = double(S(sum / double(seen)));
      given.shifts[channel] = shared_shift;
    }
    __syncthreads();
    shift = S(shared_shift);
  }
  S first = 0, second = 0;
  Entry entry(begin + threadIdx.x, call.length);
  const Entry step(kThreads, call.length);
#pragma unroll 4
  for (int64_t index = begin + threadIdx.x; index < end; index += kThreads) {
    add_entry<Storage, kGradient>(given, place_of(entry), channel, shift, first, second);
    entry.move_on(step, call.length);
  }
  const double sum = block_sum<kThreads>(double(first));
  __syncthreads();
  const double products = block_sum<kThreads>(double(second));
  if (threadIdx.x == 0) {
    given.partial[blockIdx.y * given.plan.columns + channel] = {sum, products};
  }
}

// blockIdx.x: kColumns columns; blockIdx.y: the slice of the rows.
template <typename Storage, bool kGradient>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const __grid_constant__ Arguments<Storage> given) {
  using S = Math<Storage>;
  const BatchNormCall& call = given.call;
  const int64_t columns = given.plan.columns;
  const int lane = threadIdx.x % kColumns, member = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  const int64_t begin = call.outer * blockIdx.y / gridDim.y;
  const int64_t end = call.outer * (blockIdx.y + 1) / gridDim.y;
  __shared__ Sums shared[kSharing][kColumns];
  S first = 0, second = 0;
  if (column < columns) {
    const int64_t channel = column / call.length;
    S shift = 0;
    if constexpr (kGradient) {
      shift = given.constants.center[channel];
    } else {
      const int64_t seen = call.outer < kFirstRows ? call.outer : kFirstRows;
      double sum = 0;
      for (int64_t row = 0; row < seen; ++row) {
        sum += double(static_cast<S>(given.input[row * columns + column]));
      }
      shift = S(sum / double(seen));
      if (member == 0) given.shifts[column] = double(shift);
    }
#pragma unroll 4
    for (int64_t row = begin + member; row < end; row += kSharing) {
      add_entry<Storage, kGradient>(given, row * columns + column, channel, shift, first, second);
    }
  }
  shared[member][lane] = {double(first), double(second)};
  __syncthreads();
  if (member != 0 || column >= columns) return;
  Sums total = {};
  for (int i = 0; i < kSharing; ++i) {
    total.first += shared[i][lane].first;
    total.second += shared[i][lane].second;
  }
  given.partial[blockIdx.y * columns + column] = total;
}

unsigned blocks_of(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

template <typename Storage, bool kGradient>
cudaError_t launch_sums(const Arguments<Storage>& given, cudaStream_t stream) {
  const Plan& plan = given.plan;
  if (given.call.outer * given.call.length == 0) return cudaSuccess;
  if (plan.planes) {
    return launch(plane_sums_kernel<Storage, kGradient>,
                  dim3(unsigned(plan.columns), unsigned(plan.slices)), dim3(kThreads), 0, stream,
                  given);
  }
  return launch(row_sums_kernel<Storage, kGradient>,
                dim3(blocks_of(plan.columns, kColumns), unsigned(plan.slices)), dim3(kThreads), 0,
                stream, given);
}

}  // namespace

}  // namespace tscnc::cuda
