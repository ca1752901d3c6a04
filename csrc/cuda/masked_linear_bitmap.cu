// Products of a sparse matrix with up to 16 samples at a time, whose mask is read as bits.
//
// Bound: device memory. An entry of the mask costs one bit and a kept one its value, which down to
// a density of a sixteenth is less than a column index per kept entry. Load sparse, compute dense,
// as Flash-LLM (Xia et al., arXiv 2309.10285) does: a warp spreads 8 rows out in registers, zeros
// between their kept entries, and half types are multiplied by tensor cores, so that arithmetic
// costs the same for any mask and any number of samples.
//
// A block takes tiles of 8 rows in turn, its warps the chunks of columns of a tile in turn. While a
// warp works on a chunk, the values of its next one are copied into shared memory, and the mask of
// the one after that is on its way into registers.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "launch.cuh"
#include "masked_linear.h"
#include "pack.cuh"
#include "sample_tile.cuh"
#include "tensor_core.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 8;
constexpr int kTeam = 4;  // lanes that share a row
// Columns of one step of a sum, and what a lane spreads out of a chunk if all of it is kept.
constexpr int kStep = 4, kShareBytes = 128;
// A row's kept entries of a chunk start anywhere in a pack. Also moves rows to different banks.
constexpr int kRowBytes = kTeam * kShareBytes + 16;
constexpr int kBuffers = 2, kWarpBytes = kBuffers * kRows * kRowBytes;
// Tiles whose sums a block keeps.
constexpr int kMostTiles = 32;

template <typename Storage>
constexpr int kShare = kShareBytes / sizeof(Storage);
template <typename Storage>
constexpr int kChunk = kTeam * kShare<Storage>;

// One bit per column of a lane's share.
template <typename Storage>
using Bits = std::conditional_t<sizeof(Storage) == 2, uint64_t, uint32_t>;

__device__ __forceinline__ int count_bits(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

template <typename Storage>
struct Arguments {
  const uint8_t* bits;
  const int32_t* starts;
  const Storage* values;
  int64_t rows, width, kept;
  int chunks, slice_chunks, tiles;
  Samples<Storage> input;
  const Storage* bias;
  Activation activation;
  Storage* output;
  Storage* preactivation;
};

// The sums of one tile over the lanes of a warp, and the slice of the samples that they read.
//
// In general a lane adds up its own columns of its row for all samples.
template <typename Storage, int kSamples>
struct TileSums {
  float sums[kSamples] = {};

  static constexpr int64_t slice_bytes(int columns) {
    return int64_t(columns) * kSamples * sizeof(Storage);
  }
  // All samples of a feature side by side; features of a team's lanes next to each other.
  __device__ static int place([[maybe_unused]] int columns, int feature, int sample) {
    const int lane = feature % kChunk<Storage> / kShare<Storage>, own = feature % kShare<Storage>;
    return (feature / kChunk<Storage> * kChunk<Storage> + own * kTeam + lane) * kSamples + sample;
  }
  __device__ __forceinline__ void add(const Storage* slice, [[maybe_unused]] int columns, int first,
                                      int step, const Storage (&weights)[kStep]) {
    const int member = threadIdx.x % kTeam;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int line = first + (step * kStep + i) * kTeam + member;
      const auto* packs = reinterpret_cast<const Pack<Storage>*>(slice + line * kSamples);
#pragma unroll
      for (int sample = 0; sample < kSamples; sample += kPackSize<Storage>) {
        const Pack<Storage> pack = packs[sample / kPackSize<Storage>];
#pragma unroll
        for (int j = 0; j < kPackSize<Storage>; ++j) {
          sums[sample + j] += weights[i] * pack.elements[j];
        }
      }
    }
  }
  // Into (kSamples, kRows) entries.
  __device__ __forceinline__ void store(float* tile) {
    const int row = threadIdx.x % 32 / kTeam, member = threadIdx.x % kTeam;
#pragma unroll
    for (int sample = 0; sample < kSamples; ++sample) {
      float sum = sums[sample];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (sample % kTeam == member) tile[sample * kRows + row] = sum;
    }
  }
};

// Half types: samples are rows of the tensor core's first operand, the tile is its second one.
template <typename Storage, int kSamples>
struct HalfTileSums {
  float sums[4] = {};

  static constexpr int kPadding = 16;  // moves samples to different banks

  static constexpr int64_t slice_bytes(int columns) {
    return int64_t(columns + kPadding) * kSamples * sizeof(Storage);
  }
  // All features of a sample side by side; a step's columns of a team's lanes next to each other.
  __device__ static int place(int columns, int feature, int sample) {
    const int lane = feature % kChunk<Storage> / kShare<Storage>, own = feature % kShare<Storage>;
    return sample * (columns + kPadding) + feature / kChunk<Storage> * kChunk<Storage> +
           own / kStep * (kStep * kTeam) + lane * kStep + own % kStep;
  }
  __device__ __forceinline__ void add(const Storage* slice, int columns, int first, int step,
                                      const Storage (&weights)[kStep]) {
    const int group = threadIdx.x % 32 / kTeam, member = threadIdx.x % kTeam;
    const Storage* line =
        slice + group * (columns + kPadding) + first + (step * kTeam + member) * kStep;
    const uint2 low = *reinterpret_cast<const uint2*>(line);
    uint32_t samples[4] = {low.x, 0, low.y, 0};
    if constexpr (kSamples > 8) {
      const uint2 high = *reinterpret_cast<const uint2*>(line + 8 * (columns + kPadding));
      samples[1] = high.x;
      samples[3] = high.y;
    }
    uint32_t pairs[2];
    memcpy(pairs, weights, sizeof(pairs));
    multiply_16x8x16<Storage>(sums, samples, pairs);
  }
  __device__ __forceinline__ void store(float* tile) {
    const int group = threadIdx.x % 32 / kTeam, member = threadIdx.x % kTeam;
    float* line = tile + group * kRows + 2 * member;
    line[0] = sums[0];
    line[1] = sums[1];
    if constexpr (kSamples > 8) {
      line[8 * kRows] = sums[2];
      line[8 * kRows + 1] = sums[3];
    }
  }
};
template <int kSamples>
struct TileSums<__nv_bfloat16, kSamples> : HalfTileSums<__nv_bfloat16, kSamples> {};
template <int kSamples>
struct TileSums<__half, kSamples> : HalfTileSums<__half, kSamples> {};

// A chunk of a lane's row: which columns of its share are kept, and where the row's values begin.
template <typename Storage>
struct Mask {
  Bits<Storage> bits = 0;
  int32_t start = 0;
};

template <typename Storage>
__device__ __forceinline__ Mask<Storage> load_mask(const Arguments<Storage>& call, int tile,
                                                   int chunk) {
  Mask<Storage> mask;
  const int64_t row = int64_t(tile) * kRows + threadIdx.x % 32 / kTeam;
  const int64_t column = int64_t(chunk) * kChunk<Storage> + threadIdx.x % kTeam * kShare<Storage>;
  if (tile >= call.tiles || row >= call.rows) return mask;
  mask.start = call.starts[row * call.chunks + chunk];
  if (column < call.width) {
    mask.bits =
        *reinterpret_cast<const Bits<Storage>*>(call.bits + (row * call.width + column) / 8);
  }
  return mask;
}

// Starts to copy the chunk's values of the lane's row, and returns where in the row's buffer those
// of the lane's share will be. All lanes of a warp must call it.
template <typename Storage>
__device__ __forceinline__ int fetch_values(const Arguments<Storage>& call,
                                            const Mask<Storage>& mask, unsigned char* buffer) {
  constexpr int kPack = kPackSize<Storage>;
  const int member = threadIdx.x % kTeam, own = count_bits(mask.bits);
  int until = own;
#pragma unroll
  for (int offset = 1; offset < kTeam; offset *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, until, offset, kTeam);
    if (member >= offset) until += before;
  }
  const int skipped = mask.start % kPack;
  const int end = skipped + __shfl_sync(0xffffffffu, until, kTeam - 1, kTeam);
  const int64_t first = mask.start - skipped;
  auto* target = reinterpret_cast<Storage*>(buffer + threadIdx.x % 32 / kTeam * kRowBytes);
  for (int begin = member * kPack; begin < end && end > skipped; begin += kTeam * kPack) {
    const Storage* source = call.values + first + begin;
    if (first + begin + kPack <= call.kept) {
      __pipeline_memcpy_async(target + begin, source, sizeof(Pack<Storage>));
    } else {
      for (int i = 0; first + begin + i < call.kept; ++i) target[begin + i] = source[i];
    }
  }
  __pipeline_commit();
  return skipped + until - own;
}

// Adds the products of a chunk whose values are in the buffer, the lane's share from `next` on.
template <typename Storage, int kSamples>
__device__ __forceinline__ void add_chunk(TileSums<Storage, kSamples>& sums, Bits<Storage> bits,
                                          const Storage* next, const Storage* slice, int columns,
                                          int first) {
  constexpr int kWord = 32;
#pragma unroll 1
  for (int begin = 0; begin < kShare<Storage>; begin += kWord) {
    const auto word = static_cast<uint32_t>(bits);
    bits = sizeof(bits) == 8 ? bits >> (sizeof(bits) * 4) : 0;
#pragma unroll
    for (int column = 0; column < kWord; column += kStep) {
      Storage weights[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        weights[i] = Storage(0.0f);
        if (word & 1u << (column + i)) weights[i] = *next++;
      }
      sums.add(slice, columns, first, (begin + column) / kStep, weights);
    }
  }
}

// Fills the slice with features [first, first + columns) of kSamples samples.
template <typename Storage, int kSamples>
__device__ __forceinline__ void stage_slice(Storage* slice, const Samples<Storage>& input,
                                            int64_t first_sample, int64_t first, int columns) {
#pragma unroll 1
  for (int sample = 0; sample < kSamples; ++sample) {
    for (int feature = threadIdx.x; feature < columns; feature += kThreads) {
      const bool is_inside = first + feature < input.width;
      slice[TileSums<Storage, kSamples>::place(columns, feature, sample)] =
          is_inside ? load_sample(input, first_sample + sample, first + feature) : Storage(0.0f);
    }
  }
}

// blockIdx.x: the first of the tiles that the block takes; blockIdx.y: the samples.
template <typename Storage, int kSamples>
__global__ void __launch_bounds__(kThreads, 2)
    bitmap_product_kernel(const __grid_constant__ Arguments<Storage> call) {
  constexpr int kTile = kSamples * kRows;
  auto* buffers = dynamic_shared<unsigned char>();
  auto* partial = reinterpret_cast<float*>(buffers + kWarps * kWarpBytes);
  float* sums = partial + 2 * kWarps * kTile;
  auto* slice = reinterpret_cast<Storage*>(sums + kMostTiles * kTile);
  const int warp = threadIdx.x / 32, thread = threadIdx.x;
  const int64_t first_sample = int64_t(blockIdx.y) * kSamples;
  const int columns = call.slice_chunks * kChunk<Storage>;
  unsigned char* buffer = buffers + warp * kWarpBytes;
  const int row_bytes = thread % 32 / kTeam * kRowBytes;
  for (int begin = 0; begin < call.chunks; begin += call.slice_chunks) {
    const int end = min(begin + call.slice_chunks, call.chunks);
    // All have read the slice before: they met after every tile.
    stage_slice<Storage, kSamples>(slice, call.input, first_sample,
                                   int64_t(begin) * kChunk<Storage>, columns);
    __syncthreads();
    // The chunk whose mask is loaded next. A warp without a chunk in this slice has none.
    int next_tile = begin + warp < end ? int(blockIdx.x) : call.tiles, next_chunk = begin + warp;
    const auto load_next = [&] {
      const Mask<Storage> mask = load_mask(call, next_tile, next_chunk);
      next_chunk += kWarps;
      if (next_chunk >= end) {
        next_chunk = begin + warp;
        next_tile += gridDim.x;
      }
      return mask;
    };
    Mask<Storage> mask = load_next(), following = load_next();
    int place = fetch_values(call, mask, buffer), side = 0;
    for (int tile = blockIdx.x, index = 0; tile < call.tiles; tile += gridDim.x, ++index) {
      TileSums<Storage, kSamples> tile_sums;
      for (int chunk = begin + warp; chunk < end; chunk += kWarps) {
        const Bits<Storage> bits = mask.bits;
        const auto* values =
            reinterpret_cast<const Storage*>(buffer + side * (kRows * kRowBytes) + row_bytes);
        const Storage* own = values + place;
        side ^= 1;
        mask = following;
        following = load_next();
        place = fetch_values(call, mask, buffer + side * (kRows * kRowBytes));
        __pipeline_wait_prior(1);
        __syncwarp();
        const int first = (chunk - begin) * kChunk<Storage>;
        add_chunk<Storage, kSamples>(tile_sums, bits, own, slice, columns, first);
        __syncwarp();
      }
      float* added = partial + index % 2 * kWarps * kTile;
      tile_sums.store(added + warp * kTile);
      __syncthreads();
      for (int i = thread; i < kTile; i += kThreads) {
        float sum = begin == 0 ? 0 : sums[index * kTile + i];
        for (int other = 0; other < kWarps; ++other) sum += added[other * kTile + i];
        sums[index * kTile + i] = sum;
      }
    }
  }
  for (int tile = blockIdx.x, index = 0; tile < call.tiles; tile += gridDim.x, ++index) {
    for (int i = thread; i < kTile; i += kThreads) {
      const int64_t row = int64_t(tile) * kRows + i % kRows, sample = first_sample + i / kRows;
      if (row >= call.rows || sample >= call.input.count) continue;
      float z = sums[index * kTile + i];
      if (call.bias != nullptr) z += static_cast<float>(call.bias[row]);
      const int64_t entry = sample * call.rows + row;
      if (call.preactivation != nullptr) call.preactivation[entry] = Storage(z);
      call.output[entry] = Storage(activate(z, call.activation));
    }
  }
}

int64_t chunk_of(DType dtype) {
  return dtype == DType::float32 ? kChunk<float> : kChunk<__nv_bfloat16>;
}

template <typename Storage, int kSamples>
cudaError_t launch_tiles(const BitmapCall& call, const DeviceLimits& limits, cudaStream_t stream) {
  using Sums = TileSums<Storage, kSamples>;
  const int chunks = int((call.width + kChunk<Storage> - 1) / kChunk<Storage>);
  const auto tiles = int((call.rows + kRows - 1) / kRows);
  const int64_t fixed =
      kWarps * kWarpBytes + int64_t(sizeof(float)) * (2 * kWarps + kMostTiles) * kSamples * kRows;
  // Two blocks per processor where they fit, and as many chunks at once as there is room for.
  constexpr int kReserved = 1024;
  int slice_chunks = kWarps, blocks = 2;
  int64_t room = limits.shared_bytes / blocks - kReserved;
  if (fixed + Sums::slice_bytes(slice_chunks * kChunk<Storage>) > room) {
    blocks = 1;
    room = limits.shared_bytes;
  }
  while (slice_chunks < chunks &&
         fixed + Sums::slice_bytes((slice_chunks + kWarps) * kChunk<Storage>) <= room) {
    slice_chunks += kWarps;
  }
  const Arguments<Storage> arguments = {call.bits,
                                        call.starts,
                                        static_cast<const Storage*>(call.values),
                                        call.rows,
                                        call.width,
                                        call.kept,
                                        chunks,
                                        slice_chunks,
                                        tiles,
                                        samples_of<Storage>(call.input),
                                        static_cast<const Storage*>(call.bias),
                                        call.activation,
                                        static_cast<Storage*>(call.output),
                                        static_cast<Storage*>(call.preactivation)};
  const int resident = std::min(tiles, blocks * limits.processors);
  const int grid = std::max(resident, (tiles + kMostTiles - 1) / kMostTiles);
  const auto groups = unsigned((call.input.count + kSamples - 1) / kSamples);
  const auto shared = size_t(fixed + Sums::slice_bytes(slice_chunks * kChunk<Storage>));
  return launch(bitmap_product_kernel<Storage, kSamples>, dim3(unsigned(grid), groups),
                dim3(kThreads), shared, stream, arguments);
}

}  // namespace

int64_t bitmap_chunk(DType dtype) { return dtype == DType::float64 ? 0 : chunk_of(dtype); }

bool bitmap_product_fits(const BitmapCall& call) {
  if (call.dtype == DType::float64) return false;
  const int64_t share = chunk_of(call.dtype) / kTeam;
  return call.width % share == 0 && is_aligned_for_packs(call.values) &&
         is_aligned_for_packs(call.bits);
}

cudaError_t launch_bitmap_product(const BitmapCall& call, cudaStream_t stream) {
  if (call.input.count == 0 || call.rows == 0) return cudaSuccess;
  if (!bitmap_product_fits(call)) return cudaErrorInvalidValue;
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool few = call.input.count <= 8;
  if (call.dtype == DType::float32) {
    return few ? launch_tiles<float, 8>(call, limits, stream)
               : launch_tiles<float, 16>(call, limits, stream);
  }
  if (call.dtype == DType::float16) {
    return few ? launch_tiles<__half, 8>(call, limits, stream)
               : launch_tiles<__half, 16>(call, limits, stream);
  }
  return few ? launch_tiles<__nv_bfloat16, 8>(call, limits, stream)
             : launch_tiles<__nv_bfloat16, 16>(call, limits, stream);
}

}  // namespace tscnc::cuda
