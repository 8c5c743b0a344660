// Barriers in shared memory (mbarrier), for threads and for the copy engine; and the barrier of a warpgroup. CUDA has
// no functions for these instructions of compute capability 9.0.

#ifndef JAX_TSQ_SM90_BARRIER_CUH_
#define JAX_TSQ_SM90_BARRIER_CUH_

#include <cstdint>

#include "cuda/launch.cuh"

namespace jax_tsq::sm90 {

using cuda::kAllLanes;
using cuda::kWarp;
inline constexpr int kWarpgroup = 4 * kWarp;  // the threads of a product

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

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

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_BARRIER_CUH_
