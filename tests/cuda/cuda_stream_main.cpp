// Prints what current_cuda_stream gives, after loading the library in argv[1], if any, as torch
// loads its own: with local visibility.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <exception>

#include "include/cuda_stream.h"

int main(int argc, char** argv) {
  if (argc > 1 && dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  for (int32_t device : {0, 3}) {
    try {
      const auto stream = tscnc::current_cuda_stream(device);
      std::printf("stream %ld\n", long(reinterpret_cast<intptr_t>(stream)));
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
  }
  return 0;
}
