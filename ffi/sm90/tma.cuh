// Copies of the copy engine (TMA) between a tensor in global memory and a box of it in shared memory.

#ifndef JAX_TSQ_SM90_TMA_CUH_
#define JAX_TSQ_SM90_TMA_CUH_

#include <cuda.h>

#include <cstdint>

#include "sm90/barrier.cuh"

namespace jax_tsq::sm90 {

__device__ __forceinline__ void LoadBox(void* to, const CUtensorMap& map, int32_t column, int32_t row,
                                        Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(&barrier))
      : "memory");
}

__device__ __forceinline__ void LoadBox(void* to, const CUtensorMap& map, int32_t column, int32_t row, int32_t matrix,
                                        Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(&barrier))
      : "memory");
}

// Makes a thread's writes to shared memory known to the copy engine.
__device__ __forceinline__ void FenceSharedWrites() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One store of its own group. What lies outside of the tensor is not written.
__device__ __forceinline__ void StoreBox(const CUtensorMap& map, int32_t column, int32_t row, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(SharedAddress(from))
      : "memory");
}

__device__ __forceinline__ void StoreBox(const CUtensorMap& map, int32_t column, int32_t row, int32_t matrix,
                                         const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(from))
      : "memory");
}

// Like StoreBox, but adds float32 numbers to what the tensor holds. Subnormal ones may count as zero.
__device__ __forceinline__ void AddBox(const CUtensorMap& map, int32_t column, int32_t row, int32_t matrix,
                                       const void* from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3}], [%4];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(column), "r"(row), "r"(matrix), "r"(SharedAddress(from))
      : "memory");
}

// Waits until the thread's stores have read shared memory.
__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_TMA_CUH_
