// Thread blocks of a cluster, which run at the same time and reach each other's shared memory.

#ifndef JAX_TSQ_SM90_CLUSTER_CUH_
#define JAX_TSQ_SM90_CLUSTER_CUH_

#include <cuda.h>

#include <cstdint>

#include "sm90/barrier.cuh"

namespace jax_tsq::sm90 {

// Waits for all threads of the cluster.
__device__ __forceinline__ void SyncCluster() {
  asm volatile(
      "barrier.cluster.arrive;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}

// Arrives at the same barrier of another thread block.
__device__ __forceinline__ void ArriveAt(Barrier& barrier, uint32_t thread_block) {
  // Not `.release.cluster`: what it guards is read by products, which are finished, and waiting for it is slow.
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(SharedAddress(&barrier)),
      "r"(thread_block)
      : "memory");
}

// Loads a box into the same place of every thread block whose bit is set, and tells the same barrier of each.
__device__ __forceinline__ void LoadBoxForAll(void* to, const CUtensorMap& map, int32_t column, int32_t row,
                                              Barrier& barrier, uint16_t thread_blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(&barrier)), "h"(thread_blocks)
      : "memory");
}

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_CLUSTER_CUH_
