// The product of images with a sparse kernel, and its gradient with respect to the images.
//
// A thread has some pixels of the result; a kept weight meets all of them at one offset, so that
// consecutive threads read consecutive pixels. Outside of the images they read zeros. The gradient
// is the same product with the flipped taps; a stride cuts it into phases, whose pixels all meet
// the same taps. Bound: the L2 cache, from which every kept weight reads each pixel.
#include "masked_conv2d.h"

#include <algorithm>
#include <cstring>

#include "elementwise.cuh"
#include "launch.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "sample_tile.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 128;
// Pixels of a thread, kThreads apart.
constexpr int kPixels = 4;
constexpr int kTilePixels = kThreads * kPixels;
// Threads that pack the taps of one row of the index.
constexpr int kPackers = 8;
constexpr int kPackThreads = 256;
// The largest position that a tap holds, and the row of a tap that a phase does not meet.
constexpr int64_t kMostPosition = 32767;
constexpr int kNowhere = -32768;

// A kept weight: where it reads from the pixel that its result starts at. `offset` holds the
// channel within the group, too.
template <typename S>
struct alignas(16) Tap {
  int32_t offset;
  int16_t row, column;
  int32_t group;
  S value;
};

// In 128-bit loads.
template <typename S>
__device__ __forceinline__ Tap<S> load_tap(const Tap<S>* from) {
  struct alignas(16) Words {
    uint4 words[sizeof(Tap<S>) / sizeof(uint4)];
  };
  const Words words = *reinterpret_cast<const Words*>(from);
  Tap<S> tap;
  memcpy(&tap, &words, sizeof(tap));
  return tap;
}

// An axis of the product: results `phase`, phase + result_step, ... of which result i starts at
// i * source_step.
struct GatherAxis {
  int64_t source, results;  // sizes of images and results
  int64_t source_step, result_step;
  int64_t kernel, stride, before, dilation;
};

GatherAxis axis_of(const ConvAxis& axis, bool is_gradient) {
  const ConvAxis& a = axis;
  if (is_gradient) {
    return {a.results, a.size, 1, a.stride, a.kernel, a.stride, a.before, a.dilation};
  }
  return {a.size, a.results, a.stride, 1, a.kernel, a.stride, a.before, a.dilation};
}

// Results of a phase.
__host__ __device__ __forceinline__ int64_t phase_results(const GatherAxis& axis, int64_t phase) {
  return (axis.results - phase + axis.result_step - 1) / axis.result_step;
}

// Where kernel position k reads from the place that result 0 of the phase starts at.
__device__ __forceinline__ int tap_place(const GatherAxis& axis, int64_t phase, int64_t k,
                                         bool is_gradient) {
  if (!is_gradient) return int(k * axis.dilation - axis.before);
  const int64_t place = phase + axis.before - k * axis.dilation;
  return place % axis.stride == 0 ? int(place / axis.stride) : kNowhere;
}

template <typename Storage>
struct GatherCall {
  using S = Math<Storage>;
  KeptEntries entries;
  KeptValues values;
  GatherAxis height, width;
  int64_t images, groups;
  int64_t source_channels, result_channels;  // of all groups
  bool is_gradient;
  Tap<S>* taps;  // (phases, kept)
  const Storage* source;
  const Storage* bias;
  Activation activation;
  Storage* result;
  Storage* preactivation;
};

// Writes the taps of every phase, in the order of the index; blockIdx.y is the phase.
template <typename Storage>
__global__ void __launch_bounds__(kPackThreads)
    pack_taps_kernel(const __grid_constant__ GatherCall<Storage> call) {
  const int64_t thread = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t row = thread / kPackers;
  if (row >= call.entries.rows) return;
  const GatherAxis &height = call.height, &width = call.width;
  const int64_t phase_h = blockIdx.y / width.result_step, phase_w = blockIdx.y % width.result_step;
  const int64_t kernel = height.kernel * width.kernel;
  const int64_t source_group = call.source_channels / call.groups;
  const auto* data = static_cast<const Storage*>(call.values.data);
  Tap<Math<Storage>>* taps = call.taps + blockIdx.y * call.entries.kept;
  for (int64_t entry = call.entries.pointers[row] + thread % kPackers;
       entry < call.entries.pointers[row + 1]; entry += kPackers) {
    // The index of the gradient has the kernel's positions in its rows.
    const int64_t other = call.entries.columns[entry];
    const int64_t position = call.is_gradient ? row : other;
    const int64_t channel = call.is_gradient ? other % source_group : other / kernel;
    const int64_t output = call.is_gradient ? other : row;
    const int64_t output_group =
        (call.is_gradient ? call.source_channels : call.result_channels) / call.groups;
    const int at_h = tap_place(height, phase_h, position % kernel / width.kernel, call.is_gradient);
    const int at_w = tap_place(width, phase_w, position % width.kernel, call.is_gradient);
    const bool meets = at_h != kNowhere && at_w != kNowhere;
    int64_t place = entry;
    if (call.values.is_dense) {
      place = output * call.values.row_stride + position * call.values.column_stride;
    } else if (call.values.permutation != nullptr) {
      place = call.values.permutation[entry];
    }
    Tap<Math<Storage>> tap;
    tap.offset = int32_t((channel * height.source + at_h) * width.source + at_w);
    tap.row = int16_t(meets ? at_h : kNowhere);
    tap.column = int16_t(at_w);
    tap.group = int32_t(output / output_group);
    tap.value = static_cast<Math<Storage>>(data[place]);
    taps[entry] = tap;
  }
}

// blockIdx.x: the tile of pixels; blockIdx.y: the part of the result's channels; blockIdx.z: the
// phase. A warp skips the taps that it does not meet 32 at a time.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    gather_product_kernel(const __grid_constant__ GatherCall<Storage> call) {
  using S = Math<Storage>;
  const GatherAxis &height = call.height, &width = call.width;
  const int64_t phase_h = blockIdx.z / width.result_step, phase_w = blockIdx.z % width.result_step;
  const auto rows = unsigned(phase_results(height, phase_h));
  const auto columns = unsigned(phase_results(width, phase_w));
  const unsigned pixels = unsigned(call.images) * rows * columns;
  const unsigned first = blockIdx.x * kTilePixels + threadIdx.x;
  if (blockIdx.x * kTilePixels >= pixels) return;
  const int64_t source_plane = height.source * width.source;
  const int64_t result_plane = height.results * width.results;
  int at_h[kPixels], at_w[kPixels];
  int64_t sources[kPixels];
  // Every thread's own; needed once per channel, they would cost registers all the time.
  __shared__ int64_t results[kPixels][kThreads];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const unsigned pixel = first + i * kThreads;
    const unsigned line = pixel / columns, image = line / rows;
    const int64_t h = line - image * rows, w = pixel - line * columns;
    // A pixel that there is not is far outside of the images.
    at_h[i] = pixel < pixels ? int(h * height.source_step) : 1 << 30;
    at_w[i] = int(w * width.source_step);
    sources[i] = image * call.source_channels * source_plane + at_h[i] * width.source + at_w[i];
    results[i][threadIdx.x] = image * call.result_channels * result_plane +
                              (phase_h + h * height.result_step) * width.results + phase_w +
                              w * width.result_step;
  }
  const Tap<S>* taps = call.taps + blockIdx.z * call.entries.kept;
  const auto kernel = call.is_gradient ? unsigned(height.kernel * width.kernel) : 1u;
  const auto result_group = unsigned(call.result_channels) / unsigned(call.groups);
  const auto source_group = unsigned(call.source_channels) / unsigned(call.groups);
  const auto begin = unsigned(call.result_channels * blockIdx.y / gridDim.y);
  const auto end = unsigned(call.result_channels * (blockIdx.y + 1) / gridDim.y);
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (unsigned channel = begin; channel < end; ++channel) {
    const unsigned group = channel / result_group;
    const unsigned row = call.is_gradient ? channel % result_group * kernel : channel;
    const Storage* source = call.source + group * source_group * source_plane;
    const int32_t last = call.entries.pointers[row + kernel];
    S sums[kPixels] = {};
#pragma unroll 1
    for (int32_t entry = call.entries.pointers[row]; entry < last; entry += kWarpSize) {
      bool meets = entry + lane < last;
      if (meets) {
        const Tap<S> own = load_tap(taps + entry + lane);
        meets = unsigned(own.group) == group && own.row != kNowhere;
      }
      unsigned wanted = __ballot_sync(0xffffffffu, meets);
#pragma unroll 1
      while (wanted != 0) {
        const Tap<S> tap = load_tap(taps + entry + __ffs(int(wanted)) - 1);
        wanted &= wanted - 1;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const bool inside = unsigned(at_h[i] + tap.row) < unsigned(height.source) &&
                              unsigned(at_w[i] + tap.column) < unsigned(width.source);
          const S value = inside ? static_cast<S>(source[sources[i] + tap.offset]) : S(0);
          sums[i] += tap.value * value;
        }
      }
    }
    const S bias = call.bias != nullptr ? static_cast<S>(call.bias[channel]) : S(0);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (first + i * kThreads >= pixels) break;
      const int64_t place = results[i][threadIdx.x] + channel * result_plane;
      const S z = sums[i] + bias;
      if (call.preactivation != nullptr) call.preactivation[place] = Storage(z);
      call.result[place] = Storage(activate(z, call.activation));
    }
  }
}

template <typename Storage>
cudaError_t launch_gather(const GatherCall<Storage>& call, cudaStream_t stream) {
  const int64_t phases = call.height.result_step * call.width.result_step;
  if (phases > 65535) return cudaErrorInvalidValue;
  if (call.images == 0 || call.result_channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (call.entries.kept > 0) {
    const int64_t blocks = (call.entries.rows * kPackers + kPackThreads - 1) / kPackThreads;
    error = launch(pack_taps_kernel<Storage>, dim3(unsigned(blocks), unsigned(phases)),
                   dim3(kPackThreads), 0, stream, call);
    if (error != cudaSuccess) return error;
  }
  const int64_t pixels = call.images * phase_results(call.height, 0) * phase_results(call.width, 0);
  const int64_t tiles = (pixels + kTilePixels - 1) / kTilePixels;
  // About a dozen blocks live on a processor at once.
  const int64_t wanted = 32 * limits.processors / std::max<int64_t>(1, tiles * phases);
  const int64_t parts =
      std::clamp<int64_t>(wanted, 1, std::min<int64_t>(call.result_channels, 65535));
  return launch(gather_product_kernel<Storage>,
                dim3(unsigned(tiles), unsigned(parts), unsigned(phases)), dim3(kThreads), 0, stream,
                call);
}

template <typename Storage>
GatherCall<Storage> gather_call(const ConvCall& call, bool is_gradient, void* workspace) {
  GatherCall<Storage> gather = {};
  gather.entries = is_gradient ? call.transposed : call.entries;
  gather.values = call.values;
  if (!is_gradient) gather.values.permutation = nullptr;
  gather.height = axis_of(call.height, is_gradient);
  gather.width = axis_of(call.width, is_gradient);
  gather.images = call.images;
  gather.groups = call.groups;
  gather.source_channels = is_gradient ? call.out_channels : call.in_channels;
  gather.result_channels = is_gradient ? call.in_channels : call.out_channels;
  gather.is_gradient = is_gradient;
  gather.taps = static_cast<Tap<Math<Storage>>*>(workspace);
  gather.activation = Activation::none;
  return gather;
}

// The gradient of the activation's argument.
template <typename S>
struct ScaledGradient {
  Activation activation;

  __device__ __forceinline__ S operator()(const S (&values)[2]) const {
    if (activation == Activation::relu) return values[1] <= 0 ? S(0) : values[0];
    return values[0] * gelu_gradient(values[1]);
  }
};

}  // namespace

bool conv_fits(const ConvCall& call) {
  const ConvAxis &h = call.height, &w = call.width;
  const int64_t input = call.in_channels / call.groups * h.size * w.size;
  const int64_t output = call.out_channels / call.groups * h.results * w.results;
  int64_t most = 0;
  for (const ConvAxis& axis : {h, w}) {
    const int64_t reach = axis.dilation * (axis.kernel - 1);
    most = std::max({most, axis.size + axis.before + reach, axis.results});
  }
  const int64_t pixels = call.images * std::max(h.size * w.size, h.results * w.results);
  return std::max({input, output, pixels}) < (int64_t(1) << 31) - 65536 && most <= kMostPosition &&
         h.stride * w.stride <= 65535;
}

int64_t conv_product_workspace(const ConvCall& call, bool is_gradient) {
  const int64_t phases = is_gradient ? call.height.stride * call.width.stride : 1;
  const int64_t tap = call.dtype == DType::float64 ? sizeof(Tap<double>) : sizeof(Tap<float>);
  return phases * call.entries.kept * tap;
}

cudaError_t launch_conv_product(const ConvCall& call, const void* input, const void* bias,
                                Activation activation, void* output, void* preactivation,
                                void* workspace, cudaStream_t stream) {
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    GatherCall<Storage> gather = gather_call<Storage>(call, false, workspace);
    gather.source = static_cast<const Storage*>(input);
    gather.bias = static_cast<const Storage*>(bias);
    gather.activation = activation;
    gather.result = static_cast<Storage*>(output);
    gather.preactivation = static_cast<Storage*>(preactivation);
    return launch_gather(gather, stream);
  });
}

cudaError_t launch_conv_input_gradient(const ConvCall& call, const void* gradient, void* result,
                                       void* workspace, cudaStream_t stream) {
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    GatherCall<Storage> gather = gather_call<Storage>(call, true, workspace);
    gather.source = static_cast<const Storage*>(gradient);
    gather.result = static_cast<Storage*>(result);
    return launch_gather(gather, stream);
  });
}

cudaError_t launch_scaled_gradient(const void* grad_output, const void* saved, int64_t count,
                                   Activation activation, DType dtype, void* result,
                                   cudaStream_t stream) {
  return dispatch_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const MapArrays<Storage, 2> arrays = {
        {static_cast<const Storage*>(grad_output), static_cast<const Storage*>(saved)},
        static_cast<Storage*>(result),
        count};
    return launch_map(arrays, ScaledGradient<Math<Storage>>{activation}, stream);
  });
}

}  // namespace tscnc::cuda
