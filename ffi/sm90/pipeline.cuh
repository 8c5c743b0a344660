// A pipeline: stages in shared memory that some warps fill, ahead of those that use them.

#ifndef JAX_TSQ_SM90_PIPELINE_CUH_
#define JAX_TSQ_SM90_PIPELINE_CUH_

#include <cstdint>
#include <utility>

#include "sm90/barrier.cuh"

namespace jax_tsq::sm90 {

// Registers of a role: warpgroups give back what they do not need, so that others can have it.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LeaveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A stage is full once all producers have arrived, and empty once all consumers have.
template <int kStages>
struct Pipeline {
  Barrier full[kStages], empty[kStages];
};

// Called by one thread, before FenceBarrierInit.
template <int kStages>
__device__ __forceinline__ void InitPipeline(Pipeline<kStages>& pipeline, uint32_t producers, uint32_t consumers) {
  for (int i = 0; i < kStages; ++i) {
    InitBarrier(pipeline.full[i], producers);
    InitBarrier(pipeline.empty[i], consumers);
  }
}

// A number that is known at compile time wherever it is passed to.
template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// Calls visit(block, stage, parity) for each block of a tile. Every tile starts at stage 0 and leaves out what remains
// of the last round, so that the stage is known at compile time: no address depends on it at run time. Bit i of
// `parities`, at first 0, is that of stage i: a consumer waits for `full` with it, a producer for `empty` with its
// opposite.
template <class Visit, int... kStage>
__device__ __forceinline__ void ForEachBlock(uint32_t blocks, uint32_t& parities, const Visit& visit,
                                             std::integer_sequence<int, kStage...>) {
  uint32_t block = 0;
  const auto step = [&](auto stage) {
    visit(block, stage, parities >> stage & 1);
    parities ^= 1u << stage;
    return ++block == blocks;
  };
  if (blocks == 0) return;
  while (!(step(Constant<kStage>()) || ...)) {
  }
}

template <int kStages, class Visit>
__device__ __forceinline__ void ForEachBlock(uint32_t blocks, uint32_t& parities, const Visit& visit) {
  ForEachBlock(blocks, parities, visit, std::make_integer_sequence<int, kStages>());
}

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_PIPELINE_CUH_
