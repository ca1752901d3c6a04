// Multiply-adds as fast as one core makes them, fed from registers or from memory.
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kAccumulators = 12;

using Vec = float __attribute__((vector_size(4 * kLanes)));

float sum(const Vec* accumulators) {
  float total = 0;
  for (int i = 0; i < kAccumulators; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) total += accumulators[i][lane];
  }
  return total;
}

}  // namespace

extern "C" {

int64_t roofline_step() { return kAccumulators * kLanes; }

// 2 * roofline_step() flops per repeat, no memory. Returns factor^repeats * roofline_step().
float roofline_registers(float factor, int64_t repeats) {
  const Vec multiplier = factor - Vec{}, nothing = Vec{};
  Vec accumulators[kAccumulators];
  for (Vec& accumulator : accumulators) accumulator = 1 - Vec{};
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kAccumulators; ++j) {
      accumulators[j] = accumulators[j] * multiplier + nothing;
    }
  }
  return sum(accumulators);
}

// The inner loop of a panel product: one load of activations per multiply-add with a weight that is
// in a register. `count` is a multiple of roofline_step(). Returns repeats * weight * sum of data.
float roofline_loads(const float* data, int64_t count, float weight, int64_t repeats) {
  const Vec multiplier = weight - Vec{};
  Vec accumulators[kAccumulators] = {};
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < count; i += kAccumulators * kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kAccumulators; ++j) {
        Vec loaded;
        std::memcpy(&loaded, data + i + j * kLanes, sizeof loaded);
        accumulators[j] += multiplier * loaded;
      }
    }
    // The next pass must read the memory again.
    asm volatile("" : : : "memory");
  }
  return sum(accumulators);
}
}
