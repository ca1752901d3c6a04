// What a CUDA wrapper needs from torch at run time without linking against a CUDA torch.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tscnc {

namespace detail {

using GetCurrentStream = int32_t (*)(int32_t device_index, void** stream);

// The function lives in libtorch_cuda.so, which a CPU torch lacks and a CUDA torch loads with local
// visibility, where a weak reference would stay null: so it is looked up in the loaded library.
inline GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    throw std::runtime_error(
        "tscnc_kernels: a CUDA kernel was called, but libtorch_cuda.so is not loaded; expected a "
        "CUDA build of torch");
  }
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr) {
    throw std::runtime_error(
        "tscnc_kernels: this torch's libtorch_cuda.so has no aoti_torch_get_current_cuda_stream; "
        "expected torch 2.11 or later");
  }
  return reinterpret_cast<GetCurrentStream>(symbol);
}

}  // namespace detail

// The stream that torch currently uses on this device.
inline cudaStream_t current_cuda_stream(int32_t device_index) {
  static const detail::GetCurrentStream get = detail::find_get_current_stream();
  void* stream = nullptr;
  if (get(device_index, &stream) != 0) {
    throw std::runtime_error("tscnc_kernels: torch gives no current stream for CUDA device " +
                             std::to_string(device_index));
  }
  return static_cast<cudaStream_t>(stream);
}

// Raises when a launcher reports an error.
inline void check_cuda(cudaError_t error, const char* operation) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("tscnc_kernels: ") + operation +
                             " failed on CUDA: " + cudaGetErrorString(error));
  }
}

}  // namespace tscnc
