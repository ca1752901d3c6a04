// One step of a tensor core, behind a function that a plain C++ compiler can execute too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tscnc::cuda {

// Two entries of a 16-bit type in a register, the first in the low half.
template <typename Storage>
__device__ __forceinline__ float packed_entry(uint32_t pair, int index) {
  static_assert(sizeof(Storage) == 2, "two entries fill a register");
  const auto bits = static_cast<uint16_t>(index == 0 ? pair : pair >> 16);
  Storage entry;
  memcpy(static_cast<void*>(&entry), &bits, sizeof(entry));
  return static_cast<float>(entry);
}

// The same by shuffles, the meaning of the instruction spelt out.
template <typename Storage>
__device__ __forceinline__ void multiply_16x8x16_by_shuffles(float (&sums)[4],
                                                             const uint32_t (&left)[4],
                                                             const uint32_t (&right)[2]) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int source = 0; source < 4; ++source) {
    uint32_t rows[4], columns[2][2];
    for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(0xffffffffu, left[i], group * 4 + source);
    for (int column = 0; column < 2; ++column) {
      const int lane = (2 * member + column) * 4 + source;
      for (int half = 0; half < 2; ++half) {
        columns[column][half] = __shfl_sync(0xffffffffu, right[half], lane);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        for (int entry = 0; entry < 2; ++entry) {
          sums[i] += packed_entry<Storage>(rows[2 * half + i / 2], entry) *
                     packed_entry<Storage>(columns[i % 2][half], entry);
        }
      }
    }
  }
}

// sums += left right, of a 16 x 16 and a 16 x 8 matrix over a warp, summed in float. With group =
// lane / 4 and member = lane % 4, a lane holds
//   left:  (group, depths 0 and 1), (group + 8, the same), (group, depths 2 and 3), (group + 8, …)
//   right: (depths 0 and 1, group), (depths 2 and 3, group)
//   sums:  (group, 2 member), (group, 2 member + 1), (group + 8, …), (group + 8, …)
// with four depths of its member's own. Which number these have does not matter to a sum.
template <typename Storage>
__device__ __forceinline__ void multiply_16x8x16(float (&sums)[4], const uint32_t (&left)[4],
                                                 const uint32_t (&right)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<Storage, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
    static_assert(std::is_same_v<Storage, __half>, "bfloat16 or float16");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  }
#else
  multiply_16x8x16_by_shuffles<Storage>(sums, left, right);
#endif
}

}  // namespace tscnc::cuda
