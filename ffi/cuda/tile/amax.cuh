// Largest magnitudes of a tile.

#ifndef JAX_TSQ_CUDA_TILE_AMAX_CUH_
#define JAX_TSQ_CUDA_TILE_AMAX_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

// The larger magnitude of each half, with any sign. NaN only where both are.
__device__ __forceinline__ uint32_t MaxMagnitudes(uint32_t a, uint32_t b) {
  uint32_t max;
#if __CUDA_ARCH__ >= 860
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
#else
  using Pair = __nv_bfloat162;
  const Pair pair = __hmax2(__habs2(reinterpret_cast<Pair&>(a)), __habs2(reinterpret_cast<Pair&>(b)));
  max = reinterpret_cast<const uint32_t&>(pair);
#endif
  return max;
}

__device__ __forceinline__ float LowHalf(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float HighHalf(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Columns over the quads of a warp: of the quad, then of the lanes that share the octet, each step halving the pairs
// that a lane looks after. WarpsAmax does the rest, after all threads of the block have met.
template <class Shape>
__device__ __forceinline__ void ReduceColumns(uint32_t thread, uint32_t column, const uint32_t (&pairs)[kQuad][kPairs],
                                              ColumnStorage<Shape>& storage) {
  uint32_t amax[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    amax[i] = MaxMagnitudes(MaxMagnitudes(pairs[0][i], pairs[1][i]), MaxMagnitudes(pairs[2][i], pairs[3][i]));
  }
  constexpr int kSteps = Shape::kOctets == 8 ? 2 : 1;
  static_assert(Shape::kOctets << kSteps == kWarp);
  uint32_t first_pair = column / 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int count = kPairs / 2 >> step;
    const int distance = kWarp / 2 >> step;
    const bool upper = thread & distance;
    first_pair += upper ? count : 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint32_t sent = upper ? amax[i] : amax[i + count];
      amax[i] = MaxMagnitudes(upper ? amax[i + count] : amax[i], __shfl_xor_sync(kAllLanes, sent, distance));
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs >> kSteps; ++i) storage.warp_amax[thread / kWarp][first_pair + i] = amax[i];
}

// One column of a block of tokens over all warps.
template <class Shape>
__device__ __forceinline__ float ColumnAmax(const ColumnStorage<Shape>& storage, uint32_t block, uint32_t column) {
  constexpr int kWarpsPerBlock = Shape::kWarps / Shape::kTokenBlocks;
  uint32_t max = 0;
#pragma unroll
  for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
    max = MaxMagnitudes(max, storage.warp_amax[block * kWarpsPerBlock + warp][column / 2]);
  }
  return fabsf(column % 2 ? HighHalf(max) : LowHalf(max));
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_AMAX_CUH_
