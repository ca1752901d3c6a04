// The gradients of a sparse convolution's kept weights and bias.
//
// A warp has a few kept weights of one output channel, its lanes the pixels, so that a pixel of the
// gradient is read once for all of them. Sums over slices of the pixels go to a workspace and are
// added up in order. Bound: the L2 cache.
#include <algorithm>

#include "launch.cuh"
#include "masked_conv2d.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace tscnc::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Kept weights that a warp adds up together.
constexpr int kEntries = 4;
// Pixels that are worth a slice of their own.
constexpr int64_t kSlicePixels = 2048;
constexpr int64_t kMostSlices = 32;

int64_t slices_of(const ConvCall& call) {
  const int64_t pixels = call.images * call.height.results * call.width.results;
  return std::clamp<int64_t>(pixels / kSlicePixels, 1, kMostSlices);
}

// A pixel of all results: its image, row and column.
struct Pixel {
  int64_t image;
  int row, column;
};

__device__ __forceinline__ Pixel pixel_at(int64_t index, int64_t rows, int64_t columns) {
  const int64_t line = index / columns, image = line / rows;
  return {image, int(line - image * rows), int(index - line * columns)};
}

// `step` less than an image further on in rows and columns.
__device__ __forceinline__ void move_on(Pixel& pixel, const Pixel& step, int rows, int columns) {
  pixel.column += step.column;
  const bool wraps = pixel.column >= columns;
  pixel.column -= wraps ? columns : 0;
  pixel.row += step.row + int(wraps);
  const bool ends = pixel.row >= rows;
  pixel.row -= ends ? rows : 0;
  pixel.image += step.image + int(ends);
}

// blockIdx.x: the output channel; blockIdx.y: the slice of the pixels.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    conv_weight_gradient_kernel(const __grid_constant__ ConvCall call, const Storage* gradient,
                                const Storage* input, Math<Storage>* partial) {
  using S = Math<Storage>;
  const ConvAxis &height = call.height, &width = call.width;
  const int rows = int(height.results), columns = int(width.results);
  const int64_t output = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t pixels = call.images * rows * columns;
  const int64_t first_pixel = pixels * blockIdx.y / gridDim.y;
  const int64_t last_pixel = pixels * (blockIdx.y + 1) / gridDim.y;
  const int64_t plane = height.size * width.size, result_plane = int64_t(rows) * columns;
  const auto kernel = unsigned(height.kernel * width.kernel);
  const int64_t shared = call.in_channels / call.groups;
  const int64_t group = output / (call.out_channels / call.groups);
  const Pixel step = pixel_at(kWarpSize, rows, columns);
  const Pixel start = pixel_at(first_pixel + lane, rows, columns);
  const Storage* source = input + group * shared * plane;
  const Storage* target = gradient + output * result_plane;
  const int32_t last = call.entries.pointers[output + 1];
#pragma unroll 1
  for (int32_t entry = call.entries.pointers[output] + warp * kEntries; entry < last;
       entry += kWarps * kEntries) {
    int at_h[kEntries], at_w[kEntries], offsets[kEntries];
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const auto column = unsigned(call.entries.columns[min(entry + i, last - 1)]);
      const unsigned position = column % kernel, kernel_width = unsigned(width.kernel);
      at_h[i] = int(position / kernel_width * height.dilation - height.before);
      at_w[i] = int(position % kernel_width * width.dilation - width.before);
      offsets[i] = int(column / kernel * plane + at_h[i] * width.size + at_w[i]);
    }
    S sums[kEntries] = {};
    Pixel pixel = start;
#pragma unroll 1
    for (int64_t index = first_pixel + lane; index < last_pixel; index += kWarpSize) {
      const int64_t place =
          pixel.image * call.out_channels * result_plane + pixel.row * columns + pixel.column;
      const S g = static_cast<S>(target[place]);
      const int h = int(pixel.row * height.stride), w = int(pixel.column * width.stride);
      const Storage* from = source + pixel.image * call.in_channels * plane + h * width.size + w;
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        const bool inside = unsigned(h + at_h[i]) < unsigned(height.size) &&
                            unsigned(w + at_w[i]) < unsigned(width.size);
        sums[i] += g * (inside ? static_cast<S>(from[offsets[i]]) : S(0));
      }
      move_on(pixel, step, rows, columns);
    }
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const S sum = warp_sum(sums[i]);
      if (lane == i && entry + i < last) {
        partial[blockIdx.y * call.entries.kept + entry + i] = sum;
      }
    }
  }
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    add_slices_kernel(const Math<Storage>* partial, int64_t slices, int64_t kept, Storage* result) {
  const int64_t entry = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= kept) return;
  Math<Storage> sum = partial[entry];
  for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * kept + entry];
  result[entry] = Storage(sum);
}

// One block per channel.
template <typename Storage>
__global__ void __launch_bounds__(kThreads)
    conv_bias_gradient_kernel(const Storage* gradient, int64_t images, int64_t channels,
                              int64_t plane, Storage* result) {
  using S = Math<Storage>;
  const int64_t channel = blockIdx.x;
  S sum = 0;
  for (int64_t image = 0; image < images; ++image) {
    const Storage* from = gradient + (image * channels + channel) * plane;
    S own = 0;
    for (int64_t pixel = threadIdx.x; pixel < plane; pixel += kThreads) {
      own += static_cast<S>(from[pixel]);
    }
    sum += own;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) result[channel] = Storage(sum);
}

}  // namespace

int64_t conv_weight_gradient_workspace(const ConvCall& call) {
  return slices_of(call) * call.entries.kept * (call.dtype == DType::float64 ? 8 : 4);
}

cudaError_t launch_conv_weight_gradient(const ConvCall& call, const void* gradient,
                                        const void* input, void* result, void* workspace,
                                        cudaStream_t stream) {
  const int64_t kept = call.entries.kept;
  if (kept == 0) return cudaSuccess;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t slices = slices_of(call);
    auto* partial = static_cast<Math<Storage>*>(workspace);
    const cudaError_t error =
        launch(conv_weight_gradient_kernel<Storage>,
               dim3(unsigned(call.entries.rows), unsigned(slices)), dim3(kThreads), 0, stream, call,
               static_cast<const Storage*>(gradient), static_cast<const Storage*>(input), partial);
    if (error != cudaSuccess) return error;
    return launch(add_slices_kernel<Storage>, dim3(unsigned((kept + kThreads - 1) / kThreads)),
                  dim3(kThreads), 0, stream, static_cast<const Math<Storage>*>(partial), slices,
                  kept, static_cast<Storage*>(result));
  });
}

cudaError_t launch_conv_bias_gradient(const ConvCall& call, const void* gradient, void* result,
                                      cudaStream_t stream) {
  if (call.out_channels == 0) return cudaSuccess;
  return dispatch_storage(call.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    return launch(conv_bias_gradient_kernel<Storage>, dim3(unsigned(call.out_channels)),
                  dim3(kThreads), 0, stream, static_cast<const Storage*>(gradient), call.images,
                  call.out_channels, call.height.results * call.width.results,
                  static_cast<Storage*>(result));
  });
}

}  // namespace tscnc::cuda
