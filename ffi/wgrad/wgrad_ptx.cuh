// The instructions of compute capability 9.0 that the weight gradient is made of: barriers in shared memory, bulk
// copies, products of a warpgroup. CUDA has no functions for them.

#ifndef JAX_TSQ_WGRAD_WGRAD_PTX_CUH_
#define JAX_TSQ_WGRAD_WGRAD_PTX_CUH_

#include <cuda.h>

#include <cstdint>

namespace jax_tsq {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers --------------------------------------------------------------------------------------------------------

using Barrier = uint64_t;

__device__ __forceinline__ void InitBarrier(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void Arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(&barrier)) : "memory");
}

// Arrives, and lets the phase end only once the copy engine has written so many bytes.
__device__ __forceinline__ void ArriveAndExpect(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of a phase of the given parity.
__device__ __forceinline__ void Wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(SharedAddress(&barrier)),
      "r"(parity)
      : "memory");
}

// Waits for the other warps of a warpgroup.
__device__ __forceinline__ void SyncWarpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// --- Copies ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void LoadTile(void* to, const CUtensorMap& map, int32_t column, int32_t row,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(&barrier))
      : "memory");
}

// Makes a thread's writes to shared memory known to the copy engine.
__device__ __forceinline__ void FenceSharedWrites() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One store of its own group. What lies outside of the tensor is not written.
__device__ __forceinline__ void StoreTile(const CUtensorMap& map, int32_t column, int32_t row, int32_t matrix,
                                          const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(from))
      : "memory");
}

// Waits until the thread's stores have read shared memory.
__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// --- Products --------------------------------------------------------------------------------------------------------

// Registers of a role: warpgroups give back what they do not need, so that others can have it.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LeaveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

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
  "add.u32 low, %64, " step                                                          \
  ";\n"                                                                              \
  "mov.b64 a, {low, high};\n"                                                        \
  "add.u32 low, %65, " step                                                          \
  ";\n"                                                                              \
  "mov.b64 b, {low, high};\n"                                                        \
  "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, a, b, " accumulate ", 1, 1;\n"

// Starts product[m][n] = sum over 128 tokens of a[m][t] * b[n][t] for 64 rows of a and 128 of b. The products are there
// after FinishProduct only; between the two nothing may touch them, or the compiler waits at once.
__device__ __forceinline__ void StartProduct(float (&product)[64], uint32_t a, uint32_t b) {
  // The high word: 1024 bytes from 8 rows to the next 8, and a swizzle of 128 bytes. Four steps of 32 tokens.
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
      : "r"(a), "r"(b)
      : "memory");
}

__device__ __forceinline__ void FinishProduct(float (&product)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : JAX_TSQ_64("+f", product)::"memory");
}

#undef JAX_TSQ_MMA
#undef JAX_TSQ_64
#undef JAX_TSQ_8

}  // namespace jax_tsq

#endif  // JAX_TSQ_WGRAD_WGRAD_PTX_CUH_
