// The product of many samples with a sparse matrix.
//
// Bound: shared memory. Every kept entry reads 16 bytes per team member, for 16 / sizeof(Storage)
// multiply-adds; records come from the L2 cache once per tile of samples, the input once per CTA.
#include "masked_linear.h"

#include <algorithm>

#include "launch.cuh"
#include "pack.cuh"
#include "sample_tile.cuh"

namespace tscnc::cuda {

namespace {

// One CTA fills an SM: its tile takes the shared memory, and 80 registers per thread the rest.
constexpr int kThreads = 768;
// Threads that pack one segment of a row.
constexpr int kPackers = 8;
constexpr int kPackThreads = 256;

template <int kBytes>
struct PlaceOf {
  using type = uint64_t;
};
template <>
struct PlaceOf<2> {
  using type = uint16_t;
};
template <>
struct PlaceOf<4> {
  using type = uint32_t;
};

// A kept entry: its feature's place in the tile, and its value.
template <typename Storage>
struct alignas(2 * sizeof(Storage)) Record {
  typename PlaceOf<sizeof(Storage)>::type place;
  Storage value;
};

// Segments of rows are padded to whole quads with entries that read the tile's last feature, which
// is zero. One or more 128-bit loads move a quad.
constexpr int kQuad = 4;
template <typename Storage>
struct alignas(16) Quad {
  Record<Storage> records[kQuad];
};

__host__ __device__ __forceinline__ int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// The first record of a segment whose first kept entry is `begin`. Room for the padding of all
// segments before it is certain: round_up(b + 3 s) + round_up(n) <= round_up(b + n + 3 (s + 1)).
__host__ __device__ __forceinline__ int64_t segment_place(int64_t begin, int64_t segment) {
  return round_up(begin + (kQuad - 1) * segment, kQuad);
}

// How a product is cut. A tile holds `tile_width` features and a zero; where the width needs
// several, the sums wait for the next tile in a workspace. None of it changes the order of a sum.
struct Plan {
  int team;  // threads per row, each with a pack of samples
  int64_t tile_width, tiles, sample_tiles, row_parts;
  int64_t bounds_bytes, record_bytes, partial_bytes, shared_bytes;

  int64_t bytes() const { return bounds_bytes + record_bytes + partial_bytes; }
};

template <typename Storage>
int64_t tile_bytes(int team, int64_t width) {
  return (width + 1) * team * int64_t(sizeof(Pack<Storage>));
}

template <typename Storage>
Plan plan_of(const ProductCall& call, const DeviceLimits& limits) {
  const KeptEntries& entries = call.entries;
  Plan plan = {};
  // Teams of 8 read whole 128-byte lines, smaller ones collide on half of the banks; but all
  // features in one tile are worth more, and lanes without a sample are lost.
  plan.team = sizeof(Storage) == 8 ? 2 : 8;
  while (plan.team > 2 && (tile_bytes<Storage>(plan.team, entries.width) > limits.shared_bytes ||
                           call.input.count <= plan.team / 2 * kPackSize<Storage>)) {
    plan.team /= 2;
  }
  const int64_t largest = limits.shared_bytes / tile_bytes<Storage>(plan.team, 0) - 1;
  plan.tiles = std::max<int64_t>(1, (entries.width + largest - 1) / largest);
  plan.tile_width = (entries.width + plan.tiles - 1) / plan.tiles;
  plan.shared_bytes = tile_bytes<Storage>(plan.team, plan.tile_width);
  const int64_t lanes = plan.team * kPackSize<Storage>;
  plan.sample_tiles = (call.input.count + lanes - 1) / lanes;
  const int64_t wanted = 2 * limits.processors / std::max<int64_t>(1, plan.sample_tiles);
  const int64_t row_blocks = (entries.rows * plan.team + kThreads - 1) / kThreads;
  plan.row_parts = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(row_blocks, 65535));
  const int64_t segments = entries.rows * plan.tiles;
  if (plan.tiles > 1) {
    plan.bounds_bytes = round_up(tile_bounds_length(entries, plan.tiles) * 4, 16);
    plan.partial_bytes = plan.sample_tiles * entries.rows * lanes * int64_t(sizeof(Math<Storage>));
  }
  // A quad more: the kernel loads ahead.
  plan.record_bytes =
      (segment_place(entries.kept, segments) + kQuad) * int64_t(sizeof(Record<Storage>));
  return plan;
}

template <typename Storage>
struct PackArguments {
  const int32_t* bounds;
  const int32_t* columns;
  KeptValues values;
  int64_t segments, tiles, tile_width;
  Record<Storage>* records;
};

// Writes the records of every segment, kPackers threads per segment.
template <typename Storage, int kTeam>
__global__ void __launch_bounds__(kPackThreads)
    pack_records_kernel(const __grid_constant__ PackArguments<Storage> call) {
  const int64_t thread = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t segment = thread / kPackers;
  if (segment >= call.segments) return;
  const int64_t row = segment / call.tiles;
  const auto first_column = int32_t((segment - row * call.tiles) * call.tile_width);
  const int32_t begin = call.bounds[segment];
  const int32_t length = call.bounds[segment + 1] - begin;
  const auto* data = static_cast<const Storage*>(call.values.data);
  Record<Storage>* records = call.records + segment_place(begin, segment);
  for (int i = int(thread % kPackers); i < round_up(length, kQuad); i += kPackers) {
    Record<Storage> record = {};
    unsigned place = unsigned(call.tile_width) * kTeam;
    if (i < length) {
      const int32_t column = call.columns[begin + i];
      place = tile_place<kTeam>(unsigned(column - first_column));
      int64_t source = begin + i;
      if (call.values.is_dense) {
        source = row * call.values.row_stride + column * call.values.column_stride;
      } else if (call.values.permutation != nullptr) {
        source = call.values.permutation[source];
      }
      record.value = data[source];
    } else {
      record.value = Storage(Math<Storage>(0));
    }
    record.place = static_cast<decltype(record.place)>(place);
    records[i] = record;
  }
}

template <typename Storage>
struct ProductArguments {
  Samples<Storage> input;
  const int32_t* bounds;
  const Record<Storage>* records;
  int64_t rows, tiles, tile_width;
  const Storage* bias;
  Activation activation;
  Math<Storage>* partial;
  Storage* output;
  Storage* preactivation;
};

// Adds a segment's products to the sums of one pack of samples. The next quad is on its way while
// one is used: its loads come from the L2 cache, in 128-bit words that a team shares.
template <typename Storage>
__device__ __forceinline__ void add_segment(const Quad<Storage>* quads, int count,
                                            const Pack<Storage>* tile, unsigned member,
                                            Math<Storage> (&sums)[kPackSize<Storage>]) {
  Quad<Storage> quad = quads[0];
#pragma unroll 1
  for (int i = 1; i <= count; ++i) {
    const Quad<Storage> next = quads[i];
#pragma unroll
    for (int entry = 0; entry < kQuad; ++entry) {
      const Record<Storage>& record = quad.records[entry];
      const Pack<Storage> samples = tile[record.place ^ member];
      const auto value = static_cast<Math<Storage>>(record.value);
#pragma unroll
      for (int lane = 0; lane < kPackSize<Storage>; ++lane) {
        sums[lane] += value * static_cast<Math<Storage>>(samples.elements[lane]);
      }
    }
    quad = next;
  }
}

// Bias, activation and stores. A warp's teams hold consecutive rows, so that its stores to one
// sample share sectors.
template <typename Storage>
__device__ __forceinline__ void store_row(const ProductArguments<Storage>& call, int64_t row,
                                          int64_t first_sample,
                                          const Math<Storage> (&sums)[kPackSize<Storage>]) {
  using T = Math<Storage>;
  const T bias = call.bias != nullptr ? static_cast<T>(call.bias[row]) : T(0);
#pragma unroll
  for (int lane = 0; lane < kPackSize<Storage>; ++lane) {
    const int64_t sample = first_sample + lane;
    if (sample >= call.input.count) break;
    const int64_t place = sample * call.rows + row;
    const T z = sums[lane] + bias;
    if (call.preactivation != nullptr) call.preactivation[place] = Storage(z);
    call.output[place] = Storage(activate(z, call.activation));
  }
}

// A CTA keeps a tile of samples in shared memory and streams the records of its part of the rows.
// blockIdx.x: the tile of samples; blockIdx.y: the part of the rows.
template <typename Storage, int kTeam>
__global__ void __launch_bounds__(kThreads, 1)
    panel_product_kernel(const __grid_constant__ ProductArguments<Storage> call) {
  using T = Math<Storage>;
  constexpr int kLanes = kPackSize<Storage>;
  constexpr int kTeams = kThreads / kTeam;
  auto* tile = dynamic_shared<Pack<Storage>>();
  const unsigned member = threadIdx.x % kTeam;
  const int64_t tile_sample = int64_t(blockIdx.x) * kTeam * kLanes;
  const int64_t first_sample = tile_sample + member * kLanes;
  const int64_t begin = call.rows * blockIdx.y / gridDim.y;
  const int64_t end = call.rows * (blockIdx.y + 1) / gridDim.y;
  if (threadIdx.x < kTeam) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      tile[call.tile_width * kTeam + threadIdx.x].elements[i] = Storage(T(0));
    }
  }
#pragma unroll 1
  for (int64_t part = 0; part < call.tiles; ++part) {
    const int64_t first_feature = part * call.tile_width;
    const int64_t rest = call.input.width - first_feature;
    stage_tile<kTeam, kThreads>(tile, call.input, tile_sample, first_feature,
                                int(rest < call.tile_width ? rest : call.tile_width));
    __syncthreads();
#pragma unroll 1
    for (int64_t row = begin + threadIdx.x / kTeam; row < end; row += kTeams) {
      const int64_t segment = row * call.tiles + part;
      const int32_t first = call.bounds[segment];
      const int32_t length = call.bounds[segment + 1] - first;
      const auto* quads =
          reinterpret_cast<const Quad<Storage>*>(call.records + segment_place(first, segment));
      T sums[kLanes] = {};
      T* partial = call.partial + ((blockIdx.x * call.rows + row) * kTeam + member) * kLanes;
      if (part > 0) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] = partial[lane];
      }
      add_segment<Storage>(quads, (length + kQuad - 1) / kQuad, tile, member, sums);
      if (part + 1 == call.tiles) {
        store_row<Storage>(call, row, first_sample, sums);
      } else {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) partial[lane] = sums[lane];
      }
    }
    __syncthreads();
  }
}

template <typename Storage, int kTeam>
cudaError_t launch_team(const ProductCall& call, const Plan& plan, void* workspace,
                        cudaStream_t stream) {
  const KeptEntries& entries = call.entries;
  auto* bytes = static_cast<unsigned char*>(workspace);
  auto* records = reinterpret_cast<Record<Storage>*>(bytes + plan.bounds_bytes);
  auto* partial = reinterpret_cast<Math<Storage>*>(bytes + plan.bounds_bytes + plan.record_bytes);
  const int32_t* bounds = entries.pointers;
  if (plan.tiles > 1) {
    auto* computed = reinterpret_cast<int32_t*>(bytes);
    const cudaError_t error =
        launch_tile_bounds(entries, plan.tiles, plan.tile_width, computed, stream);
    if (error != cudaSuccess) return error;
    bounds = computed;
  }
  const int64_t segments = entries.rows * plan.tiles;
  const PackArguments<Storage> pack = {bounds,     entries.columns, call.values, segments,
                                       plan.tiles, plan.tile_width, records};
  const int64_t blocks = (segments * kPackers + kPackThreads - 1) / kPackThreads;
  const cudaError_t error = launch(pack_records_kernel<Storage, kTeam>, dim3(unsigned(blocks)),
                                   dim3(kPackThreads), 0, stream, pack);
  if (error != cudaSuccess) return error;
  const ProductArguments<Storage> product = {samples_of<Storage>(call.input),
                                             bounds,
                                             records,
                                             entries.rows,
                                             plan.tiles,
                                             plan.tile_width,
                                             static_cast<const Storage*>(call.bias),
                                             call.activation,
                                             partial,
                                             static_cast<Storage*>(call.output),
                                             static_cast<Storage*>(call.preactivation)};
  return launch(panel_product_kernel<Storage, kTeam>,
                dim3(unsigned(plan.sample_tiles), unsigned(plan.row_parts)), dim3(kThreads),
                size_t(plan.shared_bytes), stream, product);
}

}  // namespace

int64_t panel_product_workspace(const ProductCall& call) {
  DeviceLimits limits;
  if (device_limits(&limits) != cudaSuccess) return 0;
  int64_t bytes = 0;
  dispatch_storage(call.dtype, [&](auto storage) {
    bytes = plan_of<decltype(storage)>(call, limits).bytes();
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t launch_panel_product(const ProductCall& call, void* workspace, cudaStream_t stream) {
  if (call.input.count == 0 || call.entries.rows == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const Plan plan = plan_of<Storage>(call, limits);
    if constexpr (sizeof(Storage) < 8) {
      if (plan.team == 8) return launch_team<Storage, 8>(call, plan, workspace, stream);
      if (plan.team == 4) return launch_team<Storage, 4>(call, plan, workspace, stream);
    }
    return launch_team<Storage, 2>(call, plan, workspace, stream);
  });
}

}  // namespace tscnc::cuda
