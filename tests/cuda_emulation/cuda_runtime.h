// A stand-in for CUDA's header of this name, found first on the include path: with it a plain C++
// compiler builds a .cu file unchanged, and its kernels run on the CPU (see fibers.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

using std::isfinite;
using std::max;
using std::min;

#define EMULATED_VECTOR(scalar, name, bytes2, bytes4)                  \
  struct alignas(bytes2) name##2 { scalar x, y; };                     \
  struct alignas(bytes4) name##4 { scalar x, y, z, w; };               \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float, 8, 16)
EMULATED_VECTOR(double, double, 16, 16)
EMULATED_VECTOR(int, int, 8, 16)
EMULATED_VECTOR(unsigned, uint, 8, 16)
EMULATED_VECTOR(unsigned short, ushort, 4, 8)
#undef EMULATED_VECTOR

// Synchronisation and warp operations. The line of the call tells two barriers apart.

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::wait_at_block_barrier(false, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return int(emulation::wait_at_block_barrier(predicate != 0, line).votes);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return __syncthreads_count(predicate, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return __syncthreads_count(predicate, line) == emulation::thread_count;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulation::wait_at_warp_operation(mask, 0, predicate != 0, line).votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  __ballot_sync(mask, 0, line);
}

namespace emulation {

inline int lane() { return current % kWarpSize; }

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(Payload), "a shuffle moves at most 16 bytes");
  std::memcpy(fibers[current].sent.data(), &value, sizeof(T));
  const Fiber& fiber = wait_at_warp_operation(mask, source, false, line);
  std::memcpy(&value, fiber.received.data(), sizeof(T));
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int segment = emulation::lane() / width * width;
  return emulation::shuffle(mask, value, segment + (source & (width - 1)), line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulation::lane(), end = lane / width * width + width;
  const int source = lane ^ bits;
  return emulation::shuffle(mask, value, source < end ? source : lane, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   int line = __builtin_LINE()) {
  const int lane = emulation::lane(), end = lane / width * width + width;
  const int source = lane + int(delta);
  return emulation::shuffle(mask, value, source < end ? source : lane, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  const int lane = emulation::lane(), begin = lane / width * width;
  const int source = lane - int(delta);
  return emulation::shuffle(mask, value, source >= begin ? source : lane, line);
}

// Atomics: a fiber is never interrupted between two waits.

template <typename T, typename U>
T atomicExch(T* address, U value) {
  return std::exchange(*address, static_cast<T>(value));
}
template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  return std::exchange(*address, std::max(*address, static_cast<T>(value)));
}
template <typename T, typename U>
T atomicMin(T* address, U value) {
  return std::exchange(*address, std::min(*address, static_cast<T>(value)));
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  return std::exchange(*address, static_cast<T>(*address | value));
}
template <typename T, typename U>
T atomicAnd(T* address, U value) {
  return std::exchange(*address, static_cast<T>(*address & value));
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return std::exchange(*address, *address == compare ? value : *address);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
// Blocks run one after the other: what a block waits for with it has happened, or never will.
inline void __nanosleep(unsigned, unsigned line = __builtin_LINE()) {
  emulation::fail("waits for a block that did not run before", "a __nanosleep", line);
}

// Other intrinsics.

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename To, typename From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float value) { return emulated_bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return emulated_bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return emulated_bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return emulated_bit_cast<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
[[noreturn]] inline void __trap() { throw std::runtime_error("the kernel trapped"); }

// Errors, streams and launches of the runtime.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return emulation::error.c_str(); }

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

// The device: two processors, so that small grids are cut as large ones are on a GPU.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool is_memory = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = is_memory ? int(tscnc::cuda::kMaxSharedBytes) : 2;
  return cudaSuccess;
}

namespace emulation {
inline std::map<const void*, size_t> shared_bytes_allowed;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > tscnc::cuda::kMaxSharedBytes) return cudaErrorInvalidValue;
  emulation::shared_bytes_allowed[kernel] = size_t(bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters exceed 4 KiB");
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto allowed = emulation::shared_bytes_allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t limit =
      allowed == emulation::shared_bytes_allowed.end() ? 48 * 1024 : allowed->second;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x >= 1u << 31 || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > emulation::kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  const bool done =
      emulation::run(grid, block, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// What a test sees of the emulation through ctypes.
extern "C" inline __attribute__((used)) void emulation_set_order(int order) {
  emulation::order = order;
}
extern "C" inline __attribute__((used)) const char* emulation_error() {
  return emulation::error.c_str();
}

// What -fsanitize=alignment,bounds calls, instead of the sanitizer's own run-time library. A GPU
// faults at a misaligned address; the CPU may not.
struct EmulatedSourceLocation {
  const char* file;
  unsigned line, column;
};
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(
    const EmulatedSourceLocation* location, uintptr_t) {
  emulation::fail("misaligned address", location->file, location->line);
}
extern "C" inline __attribute__((used)) void __ubsan_handle_out_of_bounds(
    const EmulatedSourceLocation* location, uintptr_t) {
  emulation::fail("array index out of bounds", location->file, location->line);
}
