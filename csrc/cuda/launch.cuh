// Launching kernels: the one place that does, since a kernel is also compiled by a plain C++
// compiler, which has no <<<>>>, and executed on the CPU in the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace tscnc::cuda {

// Above this a kernel has to ask for its dynamic shared memory.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Enqueues the kernel on the stream and returns the launch's error; never waits for it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace tscnc::cuda
