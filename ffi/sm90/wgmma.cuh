// Products of a warpgroup on the tensor cores (wgmma): 64 rows of one operand by 128 of the other, FP8 in shared
// memory.

#ifndef JAX_TSQ_SM90_WGMMA_CUH_
#define JAX_TSQ_SM90_WGMMA_CUH_

#include <cstdint>

#include "sm90/barrier.cuh"

namespace jax_tsq::sm90 {

inline constexpr int kProductRows = 64;
inline constexpr int kProductColumns = 128;

// A thread's part of a product: two rows, 8 apart, and of every 8 columns two. Element 4 j + i is in row
// 16 warp + lane / 4 + i / 2 * 8 and column 8 j + lane % 4 * 2 + i % 2.
using Product = float[kProductRows * kProductColumns / kWarpgroup];

// The low word of the descriptor of a matrix in shared memory: rows of 128 bytes, swizzled as the copy engine does,
// from an address that is a multiple of 1024. All lanes must have the same.
__device__ __forceinline__ uint32_t Descriptor(const void* matrix) { return SharedAddress(matrix) >> 4 | 1u << 16; }

#define JAX_TSQ_8(constraint, v, i)                                                                         \
  constraint(v[i]), constraint(v[i + 1]), constraint(v[i + 2]), constraint(v[i + 3]), constraint(v[i + 4]), \
      constraint(v[i + 5]), constraint(v[i + 6]), constraint(v[i + 7])
#define JAX_TSQ_64(constraint, v)                                                               \
  JAX_TSQ_8(constraint, v, 0), JAX_TSQ_8(constraint, v, 8), JAX_TSQ_8(constraint, v, 16),       \
      JAX_TSQ_8(constraint, v, 24), JAX_TSQ_8(constraint, v, 32), JAX_TSQ_8(constraint, v, 40), \
      JAX_TSQ_8(constraint, v, 48), JAX_TSQ_8(constraint, v, 56)
#define JAX_TSQ_MMA(step, accumulate)                                                \
  "add.u32 low, %64, %66 + " step                                                    \
  ";\n"                                                                              \
  "mov.b64 a, {low, high};\n"                                                        \
  "add.u32 low, %65, %67 + " step                                                    \
  ";\n"                                                                              \
  "mov.b64 b, {low, high};\n"                                                        \
  "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, " accumulate ", 1, 1;\n"

// Starts product[m][n] = sum over k < 128 of a[m][k] * b[n][k], for matrices whose descriptors are a + kA and b + kB:
// what is known at compile time costs no register. The products are there after FinishProduct only; between the two
// nothing may touch them, or the compiler waits at once.
template <uint32_t kA = 0, uint32_t kB = 0>
__device__ __forceinline__ void StartProduct(Product& product, uint32_t a, uint32_t b) {
  // The high word: 1024 bytes from 8 rows to the next 8, and a swizzle of 128 bytes. Four steps of 32 k.
  asm volatile(
      "{\n"
      ".reg .pred no, yes;\n"
      ".reg .b32 low, high;\n"
      ".reg .b64 a, b;\n"
      "setp.ne.b32 no, 0, 0;\n"
      "setp.eq.b32 yes, 0, 0;\n"
      "mov.b32 high, 0x40000040;\n"
      "wgmma.fence.sync.aligned;\n"
      JAX_TSQ_MMA("0", "no") JAX_TSQ_MMA("2", "yes") JAX_TSQ_MMA("4", "yes") JAX_TSQ_MMA("6", "yes")
      "wgmma.commit_group.sync.aligned;\n"
      "}"
      : JAX_TSQ_64("=f", product)
      : "r"(a), "r"(b), "n"(kA), "n"(kB)
      : "memory");
}

__device__ __forceinline__ void FinishProduct(Product& product) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : JAX_TSQ_64("+f", product)::"memory");
}

#undef JAX_TSQ_MMA
#undef JAX_TSQ_64
#undef JAX_TSQ_8

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_WGMMA_CUH_
