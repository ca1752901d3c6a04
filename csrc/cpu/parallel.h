// How torch-free kernels run a loop on torch's threads: the wrapper passes a function pointer.
#pragma once

#include <cstdint>

namespace tscnc {

// Runs body(context, begin, end) over disjoint ranges that cover [0, count), possibly at the same
// time.
using ParallelFor = void (*)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

#ifdef TSCNC_ISA  // only inside the per-ISA files
namespace TSCNC_ISA {

// `parallel` may be null: the loop then runs here.
template <class Body>
void for_each_range(ParallelFor parallel, int64_t count, const Body& body) {
  if (count <= 0) return;
  if (parallel == nullptr || count == 1) {
    body(int64_t{0}, count);
    return;
  }
  const auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  parallel(count, call, const_cast<Body*>(&body));
}

}  // namespace TSCNC_ISA
#endif
}  // namespace tscnc
