// Marks a formula that the CPU loops and the CUDA kernels share.
//
// Always inlined on the host too: the CPU kernels are compiled once per instruction set, and an
// out-of-line copy made with AVX-512 flags must never be the one that the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define TSCNC_HD __host__ __device__ __forceinline__
#else
#define TSCNC_HD inline __attribute__((always_inline))
#endif
