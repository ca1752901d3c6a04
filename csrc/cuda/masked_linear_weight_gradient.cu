// The gradients of a masked layer's kept entries and bias for many samples.
//
// Bound: shared memory. Every kept entry reads one feature's samples from a tile of the input; the
// samples of the row's own gradient stay in registers. Sums over slices of the batch go to a
// workspace and are added up in order.
#include <algorithm>

#include "launch.cuh"
#include "masked_linear.h"
#include "pack.cuh"
#include "sample_tile.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 512;
// Threads that share a row; each owns two packs of a feature's samples, 256 bytes in all.
constexpr int kTeam = 8;
constexpr int kTeams = kThreads / kTeam;
constexpr int kPacks = 2 * kTeam;
// 128 KiB of input and 16 KiB of gradient, which also fit on sm_80.
constexpr int kTileWidth = 512;
constexpr int kBlockRows = kTeams;
constexpr int kSharedPacks = (kTileWidth + kBlockRows) * kPacks;
// Packs of the next rows' gradient that a thread holds while it works on the present ones.
constexpr int kAhead = kBlockRows * kPacks / kThreads;
// Kept entries that are reduced over the team together.
constexpr int kEntries = 4;
constexpr int kReduceThreads = 256;

template <typename Storage>
constexpr int kChunkSamples = kPacks * kPackSize<Storage>;

// How the work is cut: a CTA has one tile of columns, one part of the rows and one slice of the
// batch. The slices, and with them the bits of the result, depend on the shapes alone.
struct Plan {
  int64_t tiles, chunks, slices, row_parts, bounds_bytes, partial_bytes;
};

template <typename Storage>
Plan plan_of(const WeightGradientCall& call, int processors) {
  const KeptEntries& entries = call.entries;
  Plan plan = {};
  plan.tiles = (entries.width + kTileWidth - 1) / kTileWidth;
  plan.chunks = (call.input.count + kChunkSamples<Storage> - 1) / kChunkSamples<Storage>;
  const int64_t wanted_slices = std::max<int64_t>(8, 64 / plan.tiles);
  plan.slices = std::clamp<int64_t>(plan.chunks, 1, wanted_slices);
  const int64_t row_blocks = (entries.rows + kBlockRows - 1) / kBlockRows;
  const int64_t wanted = 2 * processors / (plan.tiles * plan.slices);
  plan.row_parts = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(row_blocks, 65535));
  if (plan.tiles > 1) {
    plan.bounds_bytes = (tile_bounds_length(entries, plan.tiles) * 4 + 15) / 16 * 16;
  }
  plan.partial_bytes = plan.slices * entries.kept * int64_t(sizeof(Math<Storage>));
  return plan;
}

template <typename Storage>
struct Arguments {
  Samples<Storage> input, gradient;
  const int32_t* bounds;
  const int32_t* columns;
  int64_t rows, kept, tiles, chunks;
  Math<Storage>* partial;  // (slices, kept)
};

// Sums kEntries values over the 8 threads of a team: thread `member` gets that of entry member % 4.
// Every exchange halves what is left to add, four shuffles instead of twelve.
template <typename T>
__device__ __forceinline__ T team_sum(const T (&values)[kEntries], unsigned member) {
  static_assert(kTeam == 8 && kEntries == 4, "written out for these");
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kTeam * kTeam);
  const bool odd = member & 1;
  T first = odd ? values[1] : values[0];
  T second = odd ? values[3] : values[2];
  first += __shfl_xor_sync(mask, odd ? values[0] : values[1], 1);
  second += __shfl_xor_sync(mask, odd ? values[2] : values[3], 1);
  const bool high = member & 2;
  T sum = high ? second : first;
  sum += __shfl_xor_sync(mask, high ? first : second, 2);
  return sum + __shfl_xor_sync(mask, sum, 4);
}

// One team's row: adds the chunk's products at the kept entries [begin, end) to the slice's sums.
template <typename Storage>
__device__ __forceinline__ void add_row(const Pack<Storage>* tile, const Pack<Storage>* gradient,
                                        const int32_t* columns, int32_t first_column, int32_t begin,
                                        int32_t end, unsigned member, bool is_first,
                                        Math<Storage>* partial) {
  using T = Math<Storage>;
  constexpr int kLanes = kPackSize<Storage>;
  if (begin == end) return;
  T row[2 * kLanes];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      row[half * kLanes + lane] = static_cast<T>(gradient[half * kTeam].elements[lane]);
    }
  }
  int32_t next[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) next[i] = columns[min(begin + i, end - 1)];
#pragma unroll 1
  for (int32_t entry = begin; entry < end; entry += kEntries) {
    unsigned places[kEntries];
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      places[i] = tile_place<kPacks>(unsigned(next[i] - first_column)) ^ member;
      next[i] = columns[min(entry + kEntries + i, end - 1)];
    }
    T sums[kEntries] = {};
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pack<Storage> samples = tile[places[i] ^ (half * kTeam)];
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          sums[i] += row[half * kLanes + lane] * static_cast<T>(samples.elements[lane]);
        }
      }
    }
    const T sum = team_sum<T>(sums, member);
    const int32_t mine = entry + int32_t(member);
    if (member < kEntries && mine < end) partial[mine] = is_first ? sum : partial[mine] + sum;
  }
}

// blockIdx.x: the tile of columns; blockIdx.y: the part of the rows; blockIdx.z: the slice.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(const __grid_constant__ Arguments<Storage> call) {
  constexpr int kLanes = kPackSize<Storage>;
  auto* tile = dynamic_shared<Pack<Storage>>();
  auto* gradient = tile + kTileWidth * kPacks;
  const unsigned member = threadIdx.x % kTeam;
  const int team = threadIdx.x / kTeam;
  const auto first_column = int32_t(blockIdx.x) * kTileWidth;
  const int64_t rest = call.input.width - first_column;
  const int64_t begin = call.rows * blockIdx.y / gridDim.y;
  const int64_t end = call.rows * (blockIdx.y + 1) / gridDim.y;
  const int64_t first_chunk = call.chunks * blockIdx.z / gridDim.z;
  const int64_t last_chunk = call.chunks * (blockIdx.z + 1) / gridDim.z;
  Math<Storage>* partial = call.partial + blockIdx.z * call.kept;
#pragma unroll 1
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t first_sample = chunk * kChunkSamples<Storage>;
    stage_tile<kPacks, kThreads>(tile, call.input, first_sample, first_column,
                                 int(rest < kTileWidth ? rest : kTileWidth));
    Pack<Storage> ahead[kAhead] = {};
    // Consecutive threads take consecutive rows of the gradient, which its matrix holds together.
    const int fetched = threadIdx.x % kBlockRows;
    const auto fetch = [&](int64_t block) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int pack = threadIdx.x / kBlockRows + i * (kThreads / kBlockRows);
        if (block + fetched < end) {
          ahead[i] = load_pack(call.gradient, first_sample + pack * kLanes, block + fetched);
        }
      }
    };
    fetch(begin);
#pragma unroll 1
    for (int64_t block = begin; block < end; block += kBlockRows) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int pack = threadIdx.x / kBlockRows + i * (kThreads / kBlockRows);
        gradient[tile_place<kPacks>(unsigned(fetched)) ^ unsigned(pack)] = ahead[i];
      }
      __syncthreads();
      if (block + kBlockRows < end) fetch(block + kBlockRows);
      const int64_t row = block + team;
      if (row < end) {
        const int64_t segment = row * call.tiles + blockIdx.x;
        const auto* packs = gradient + (tile_place<kPacks>(unsigned(team)) ^ member);
        add_row<Storage>(tile, packs, call.columns, first_column, call.bounds[segment],
                         call.bounds[segment + 1], member, chunk == first_chunk, partial);
      }
      __syncthreads();
    }
  }
}

// Adds up the slices, in order, into the kept values or, row by row, into a dense matrix of zeros.
template <typename Storage>
__global__ void __launch_bounds__(kReduceThreads)
    add_slices_kernel(const Math<Storage>* partial, int64_t slices,
                      const __grid_constant__ KeptEntries entries, bool is_dense, Storage* result) {
  const int64_t thread = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  const auto sum_at = [&](int64_t entry) {
    Math<Storage> sum = partial[entry];
    for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * entries.kept + entry];
    return Storage(sum);
  };
  if (!is_dense) {
    if (thread < entries.kept) result[thread] = sum_at(thread);
    return;
  }
  const int64_t row = thread / kTeam;
  if (row >= entries.rows) return;
  for (int32_t entry = entries.pointers[row] + int32_t(thread % kTeam);
       entry < entries.pointers[row + 1]; entry += kTeam) {
    result[row * entries.width + entries.columns[entry]] = sum_at(entry);
  }
}

template <typename Storage>
cudaError_t launch_all(const WeightGradientCall& call, void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const KeptEntries& entries = call.entries;
  const Plan plan = plan_of<Storage>(call, limits.processors);
  const int32_t* bounds = entries.pointers;
  if (plan.tiles > 1) {
    auto* computed = static_cast<int32_t*>(workspace);
    error = launch_tile_bounds(entries, plan.tiles, kTileWidth, computed, stream);
    if (error != cudaSuccess) return error;
    bounds = computed;
  }
  auto* partial =
      reinterpret_cast<Math<Storage>*>(static_cast<unsigned char*>(workspace) + plan.bounds_bytes);
  const Arguments<Storage> arguments = {samples_of<Storage>(call.input),
                                        samples_of<Storage>(call.gradient),
                                        bounds,
                                        entries.columns,
                                        entries.rows,
                                        entries.kept,
                                        plan.tiles,
                                        plan.chunks,
                                        partial};
  error = launch(weight_gradient_kernel<Storage>,
                 dim3(unsigned(plan.tiles), unsigned(plan.row_parts), unsigned(plan.slices)),
                 dim3(kThreads), kSharedPacks * sizeof(Pack<Storage>), stream, arguments);
  if (error != cudaSuccess) return error;
  const int64_t threads = call.is_dense ? entries.rows * kTeam : entries.kept;
  return launch(add_slices_kernel<Storage>,
                dim3(unsigned((threads + kReduceThreads - 1) / kReduceThreads)),
                dim3(kReduceThreads), 0, stream, static_cast<const Math<Storage>*>(partial),
                plan.slices, entries, call.is_dense, static_cast<Storage*>(call.result));
}

// The result without any products: no entries at all, or no samples.
template <typename Storage>
cudaError_t clear(const WeightGradientCall& call, cudaStream_t stream) {
  const int64_t count = call.is_dense ? call.entries.rows * call.entries.width : call.entries.kept;
  return cudaMemsetAsync(call.result, 0, size_t(count) * sizeof(Storage), stream);
}

// Partial sums of columns: threads take consecutive features, blockIdx.y a slice of the samples.
constexpr int kBiasThreads = 128;
constexpr int kBiasSamples = 64;

template <typename Storage>
__global__ void __launch_bounds__(kBiasThreads)
    bias_gradient_kernel(const __grid_constant__ Samples<Storage> gradient,
                         Math<Storage>* partial) {
  const int64_t feature = int64_t(blockIdx.x) * kBiasThreads + threadIdx.x;
  if (feature >= gradient.width) return;
  const int64_t begin = gradient.count * blockIdx.y / gridDim.y;
  const int64_t end = gradient.count * (blockIdx.y + 1) / gridDim.y;
  Math<Storage> sum = 0;
#pragma unroll 4
  for (int64_t sample = begin; sample < end; ++sample) {
    sum += static_cast<Math<Storage>>(load_sample(gradient, sample, feature));
  }
  partial[blockIdx.y * gradient.width + feature] = sum;
}

int64_t bias_slices(const SampleMatrix& gradient) {
  return std::clamp<int64_t>(gradient.count / kBiasSamples, 1, 256);
}

}  // namespace

int64_t weight_gradient_workspace(const WeightGradientCall& call) {
  int64_t bytes = 0;
  dispatch_storage(call.dtype, [&](auto storage) {
    const Plan plan = plan_of<decltype(storage)>(call, 1);
    bytes = plan.bounds_bytes + plan.partial_bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t launch_weight_gradient(const WeightGradientCall& call, void* workspace,
                                   cudaStream_t stream) {
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const bool is_empty = call.entries.kept == 0 || call.input.count == 0;
    if (is_empty || call.is_dense) {
      const cudaError_t error = clear<Storage>(call, stream);
      if (error != cudaSuccess || is_empty) return error;
    }
    return launch_all<Storage>(call, workspace, stream);
  });
}

int64_t bias_gradient_workspace(const SampleMatrix& gradient, DType dtype) {
  return bias_slices(gradient) * gradient.width * (dtype == DType::float64 ? 8 : 4);
}

cudaError_t launch_bias_gradient(const SampleMatrix& gradient, void* result, DType dtype,
                                 void* workspace, cudaStream_t stream) {
  if (gradient.width == 0) return cudaSuccess;
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t slices = bias_slices(gradient);
    auto* partial = static_cast<Math<Storage>*>(workspace);
    const auto blocks = unsigned((gradient.width + kBiasThreads - 1) / kBiasThreads);
    const cudaError_t error =
        launch(bias_gradient_kernel<Storage>, dim3(blocks, unsigned(slices)), dim3(kBiasThreads), 0,
               stream, samples_of<Storage>(gradient), partial);
    if (error != cudaSuccess) return error;
    const KeptEntries entries = {nullptr, nullptr, 1, gradient.width, gradient.width};
    const auto sums = unsigned((gradient.width + kReduceThreads - 1) / kReduceThreads);
    return launch(add_slices_kernel<Storage>, dim3(sums), dim3(kReduceThreads), 0, stream,
                  static_cast<const Math<Storage>*>(partial), slices, entries, false,
                  static_cast<Storage*>(result));
  });
}

}  // namespace tscnc::cuda
