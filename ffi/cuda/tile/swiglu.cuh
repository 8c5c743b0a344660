// A tile that SwiGLU or its gradient makes of others: pairs of bf16 in, pairs of bf16 out.

#ifndef JAX_TSQ_CUDA_TILE_SWIGLU_CUH_
#define JAX_TSQ_CUDA_TILE_SWIGLU_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "core/swiglu.h"
#include "cuda/launch.cuh"
#include "cuda/tile/amax.cuh"
#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

__device__ __forceinline__ uint32_t RoundPair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Pairs of h.
template <bool kLimited>
__device__ __forceinline__ uint32_t SwigluPair(uint32_t gate, uint32_t up, float weight, float limit) {
  return RoundPair(Swiglu<kLimited>(LowHalf(gate), LowHalf(up), limit) * weight,
                   Swiglu<kLimited>(HighHalf(gate), HighHalf(up), limit) * weight);
}

struct SwigluPairGradients {
  uint32_t dgate, dup, h;
  float sum;  // what the pair adds to the weight's gradient
};

template <bool kLimited>
__device__ __forceinline__ SwigluPairGradients DifferentiatePair(uint32_t gate, uint32_t up, uint32_t dh, float weight,
                                                                 float limit) {
  const float dlow = LowHalf(dh), dhigh = HighHalf(dh);
  const SwigluGradients low = SwigluBackward<kLimited>(LowHalf(gate), LowHalf(up), dlow * weight, limit);
  const SwigluGradients high = SwigluBackward<kLimited>(HighHalf(gate), HighHalf(up), dhigh * weight, limit);
  return {RoundPair(low.gate, high.gate), RoundPair(low.up, high.up),
          RoundPair(low.activation * weight, high.activation * weight),
          dlow * low.activation + dhigh * high.activation};
}

// Weights of the rows from `row` on, of which the first `rows` exist.
template <int kRows>
__device__ __forceinline__ void LoadWeights(const float* weights, int64_t row, int rows, float (&weight)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) weight[r] = weights != nullptr && r < rows ? __ldg(weights + row + r) : 1.0f;
}

// Over a block of features of a row, of which each of kRowLanes lanes has added up an octet: neighbouring lanes first.
__device__ __forceinline__ float SumLanes(float sum) {
#pragma unroll
  for (int distance = 1; distance < kRowLanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_SWIGLU_CUH_
