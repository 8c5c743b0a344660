// From bf16 to float8_e4m3fn.

#ifndef JAX_TSQ_CUDA_TILE_CONVERT_CUH_
#define JAX_TSQ_CUDA_TILE_CONVERT_CUH_

#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/tile/amax.cuh"
#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

// Four products as one word of float8_e4m3fn. As halves of a vector the second conversion can merge the first.
__device__ __forceinline__ uint32_t ConvertQuad(float a, float b, float c, float d, float quant_scale) {
  const ushort2 halves = {
      __nv_cvt_float2_to_fp8x2(make_float2(a * quant_scale, b * quant_scale), __NV_SATFINITE, __NV_E4M3),
      __nv_cvt_float2_to_fp8x2(make_float2(c * quant_scale, d * quant_scale), __NV_SATFINITE, __NV_E4M3)};
  return reinterpret_cast<const uint32_t&>(halves);
}

// The quad as a word for each feature, by the features' scales.
template <class Shape>
__device__ __forceinline__ void ConvertColumns(uint32_t row, uint32_t column, const uint32_t (&pairs)[kQuad][kPairs],
                                               ColumnStorage<Shape>& storage) {
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

// An octet of a row.
__device__ __forceinline__ uint2 ConvertOctet(const uint32_t (&pairs)[kPairs], float quant_scale) {
  return {ConvertQuad(LowHalf(pairs[0]), HighHalf(pairs[0]), LowHalf(pairs[1]), HighHalf(pairs[1]), quant_scale),
          ConvertQuad(LowHalf(pairs[2]), HighHalf(pairs[2]), LowHalf(pairs[3]), HighHalf(pairs[3]), quant_scale)};
}

// Four words of four bytes each: byte i of word j becomes byte j of word i.
__device__ __forceinline__ void TransposeBytes(uint32_t (&words)[kQuad]) {
  const uint32_t low[2] = {__byte_perm(words[0], words[1], 0x5140), __byte_perm(words[2], words[3], 0x5140)};
  const uint32_t high[2] = {__byte_perm(words[0], words[1], 0x7362), __byte_perm(words[2], words[3], 0x7362)};
  words[0] = __byte_perm(low[0], low[1], 0x5410);
  words[1] = __byte_perm(low[0], low[1], 0x7632);
  words[2] = __byte_perm(high[0], high[1], 0x5410);
  words[3] = __byte_perm(high[0], high[1], 0x7632);
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_CONVERT_CUH_
