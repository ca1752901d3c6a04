// A stand-in for CUDA's header of this name: copies into shared memory that happen when their
// thread waits for them, which is as late as they can.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
};
// Of every thread: the groups that it has committed, oldest first, and the one that is open.
inline std::vector<std::deque<std::vector<Copy>>> committed(kMaxThreads);
inline std::vector<std::vector<Copy>> open(kMaxThreads);

}  // namespace emulation

inline void __pipeline_memcpy_async(void* target, const void* source, size_t bytes) {
  const auto misaligned = [&](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % bytes != 0;
  };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned(target) || misaligned(source)) {
    emulation::fail("misaligned asynchronous copy", __FILE__, __LINE__);
  }
  emulation::open[emulation::current].push_back({target, source, bytes});
}
inline void __pipeline_commit() {
  auto& group = emulation::open[emulation::current];
  emulation::committed[emulation::current].push_back(std::move(group));
  group.clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = emulation::committed[emulation::current];
  for (; groups.size() > left; groups.pop_front()) {
    for (const auto& copy : groups.front()) std::memcpy(copy.target, copy.source, copy.bytes);
  }
}
