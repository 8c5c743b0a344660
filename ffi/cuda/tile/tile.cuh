// One tile of tokens x features on the GPU: load -> amax -> scale -> convert -> transpose -> store.
//
// Every operation runs this tile; only where its rows come from and where its columns go differs. A thread owns four
// consecutive tokens of eight consecutive features: 16-byte loads along a row of bf16, and four tokens of one feature
// make one 32-bit word of output.

#ifndef JAX_TSQ_CUDA_TILE_TILE_CUH_
#define JAX_TSQ_CUDA_TILE_TILE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/tile/load.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/store_columns.cuh"

namespace jax_tsq {

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

// Four products as one word of float8_e4m3fn. As halves of a vector the second conversion can merge the first.
__device__ __forceinline__ uint32_t ConvertQuad(float a, float b, float c, float d, float quant_scale) {
  const ushort2 halves = {
      __nv_cvt_float2_to_fp8x2(make_float2(a * quant_scale, b * quant_scale), __NV_SATFINITE, __NV_E4M3),
      __nv_cvt_float2_to_fp8x2(make_float2(c * quant_scale, d * quant_scale), __NV_SATFINITE, __NV_E4M3)};
  return reinterpret_cast<const uint32_t&>(halves);
}

// Called by all threads of a block. `destination` is a function, called where the tile is stored: what it returns then
// occupies no registers while the loads are in flight.
template <class Shape, class Destination>
__device__ __forceinline__ void RunTile(const Input& input, const TileSource& source, const Destination& destination,
                                        TileStorage<Shape>& storage) {
  // Lanes walk along the row first.
  const uint32_t thread = threadIdx.x;
  const uint32_t row = thread / Shape::kOctets * kQuad;
  const uint32_t column = thread % Shape::kOctets * kOctet;

  // Load
  uint32_t pairs[kQuad][kPairs];
  LoadPairs<Shape>(input, source, row, column, pairs);

  // Amax: of the quad, then of the lanes that share the octet, each step halving the pairs that a lane looks after,
  // and then of the warps
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
  __syncthreads();

  // Scale
  if (thread < Shape::kTokenBlocks * Shape::kColumns) {
    constexpr int kWarpsPerBlock = Shape::kWarps / Shape::kTokenBlocks;
    const uint32_t block = thread / Shape::kColumns;
    const uint32_t feature = thread % Shape::kColumns;
    uint32_t max = 0;
#pragma unroll
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
      max = MaxMagnitudes(max, storage.warp_amax[block * kWarpsPerBlock + warp][feature / 2]);
    }
    const float quant_scale = QuantScale(fabsf(feature % 2 ? HighHalf(max) : LowHalf(max)), input.pow_2_scales);
    storage.quant_scales[block][feature % kOctet / 2][feature / kOctet][feature % 2] = quant_scale;
    const TileDestination target = destination();
    const uint32_t features = static_cast<uint32_t>(input.features);
    if (source.first_column + feature < features && static_cast<int>(block * kBlock) < target.tokens) {
      target.dequant_scales[uint64_t{block} * features + source.first_column + feature] = 1.0f / quant_scale;
    }
  }
  __syncthreads();

  // Convert and transpose, except blocks behind the end of a short expert
  if (!(Shape::kShortExperts && Shape::kTokenBlocks > 1) || static_cast<int>(row / kBlock * kBlock) < source.rows) {
    const float* quant_scales = storage.quant_scales[row / kBlock][0][column / kOctet];
    uint32_t (*words)[kBlock / kQuad] = &storage.words[row / kBlock][column];
    const uint32_t position = SwizzledWord(column, row % kBlock / kQuad);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 quant_scale = reinterpret_cast<const float2*>(quant_scales)[i * Shape::kOctets];
      words[2 * i][position] = ConvertQuad(LowHalf(pairs[0][i]), LowHalf(pairs[1][i]), LowHalf(pairs[2][i]),
                                           LowHalf(pairs[3][i]), quant_scale.x);
      words[2 * i + 1][position] = ConvertQuad(HighHalf(pairs[0][i]), HighHalf(pairs[1][i]), HighHalf(pairs[2][i]),
                                               HighHalf(pairs[3][i]), quant_scale.y);
    }
  }
  __syncthreads();

  // Store
  StoreTile<Shape>(input, source.first_column, destination(), storage);
}

// The same for a tile without rows: nothing to load, and zeros to store.
template <class Shape>
__device__ __forceinline__ void RunEmptyTile(const Input& input, uint32_t first_column,
                                             const TileDestination& destination, const TileStorage<Shape>& storage) {
  const uint32_t column = first_column + threadIdx.x;
  if (threadIdx.x < Shape::kColumns && column < input.features) destination.dequant_scales[column] = 1.0f;
  StoreTile<Shape, true>(input, first_column, destination, storage);
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_CUDA_TILE_TILE_CUH_
