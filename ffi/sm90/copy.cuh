// Copies that a thread starts itself (cp.async), of as little as one float, and that a barrier waits for.

#ifndef JAX_TSQ_SM90_COPY_CUH_
#define JAX_TSQ_SM90_COPY_CUH_

#include <cstdint>

#include "sm90/barrier.cuh"

namespace jax_tsq::sm90 {

__device__ __forceinline__ void CopyFloat(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from) : "memory");
}

// Arrives once all that this thread has started to copy is there.
__device__ __forceinline__ void ArriveAfterCopies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(&barrier)) : "memory");
}

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_COPY_CUH_
