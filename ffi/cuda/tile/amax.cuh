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
  constexpr int kWarpsPerBlock = Shape::kWarps * Shape::kTurns / Shape::kTokenBlocks;
  uint32_t max = 0;
#pragma unroll
  for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
    max = MaxMagnitudes(max, storage.warp_amax[block * kWarpsPerBlock + warp][column / 2]);
  }
  return fabsf(column % 2 ? HighHalf(max) : LowHalf(max));
}

// Rows of a block of features, of which each of kRowLanes lanes holds an octet; lane i gets the maximum of row
// i / (kRowLanes / kRows). Each step halves the words that a lane looks after, as long as there are several.
template <int kRows>
__device__ __forceinline__ float RowAmax(const uint32_t (&pairs)[kRows][kPairs]) {
  uint32_t amax[kRows / 2];  // of two rows each
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    uint32_t row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t (&octet)[kPairs] = pairs[2 * i + r];
      row[r] = MaxMagnitudes(MaxMagnitudes(octet[0], octet[1]), MaxMagnitudes(octet[2], octet[3]));
    }
    amax[i] = MaxMagnitudes(__byte_perm(row[0], row[1], 0x5410), __byte_perm(row[0], row[1], 0x7632));
  }
  constexpr int kLanesPerRow = kRowLanes / kRows;
#pragma unroll
  for (int distance = kRowLanes / 2; distance > kLanesPerRow; distance /= 2) {
    const int count = kRows * distance / (2 * kRowLanes);
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint32_t sent = upper ? amax[i] : amax[i + count];
      amax[i] = MaxMagnitudes(upper ? amax[i + count] : amax[i], __shfl_xor_sync(kAllLanes, sent, distance));
    }
  }
#pragma unroll
  for (int distance = kLanesPerRow; distance > 0; distance /= 2) {
    amax[0] = MaxMagnitudes(amax[0], __shfl_xor_sync(kAllLanes, amax[0], distance));
  }
  return fabsf(threadIdx.x & kLanesPerRow ? HighHalf(amax[0]) : LowHalf(amax[0]));
}

// The whole tile, called by all threads of a block with the larger magnitudes of 0 and all their pairs, which is no
// NaN. Then integers have the order of the values.
template <int kWarps>
__device__ __forceinline__ float TileAmax(uint32_t amax, uint32_t (&warp_amax)[kWarps]) {
  amax = __reduce_max_sync(kAllLanes, MaxMagnitudes(amax, amax >> 16) & 0x7FFF);
  const uint32_t lane = threadIdx.x % kWarp;
  if (lane == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  return LowHalf(__reduce_max_sync(kAllLanes, warp_amax[lane % kWarps]));
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_AMAX_CUH_
