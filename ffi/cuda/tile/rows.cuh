// A tile quantized along features: amax -> scale -> convert -> store. It is a block of features wide.

#ifndef JAX_TSQ_CUDA_TILE_ROWS_CUH_
#define JAX_TSQ_CUDA_TILE_ROWS_CUH_

#include <cstdint>

#include "core/numerics.h"
#include "cuda/tile/amax.cuh"
#include "cuda/tile/convert.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/store_rows.cuh"

namespace jax_tsq::cuda {

// Keeps the octet's first `columns` elements: what follows in memory is of the next row.
template <int kRows>
__device__ __forceinline__ void ClearBehind(int columns, uint32_t (&pairs)[kRows][kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t mask = columns > 2 * i + 1 ? 0xFFFFFFFFu : columns > 2 * i ? 0xFFFFu : 0u;
#pragma unroll
    for (int r = 0; r < kRows; ++r) pairs[r][i] &= mask;
  }
}

// Called by whole warps, kRowLanes lanes with octets of the same rows: those from `row` on.
template <bool kAligned, int kRows>
__device__ __forceinline__ void QuantizeRows(uint32_t (&pairs)[kRows][kPairs], bool pow_2_scales, uint32_t row,
                                             const RowDestination& destination) {
  constexpr uint32_t kLanesPerRow = kRowLanes / kRows;
  const uint32_t lane = threadIdx.x % kRowLanes;
  if constexpr (!kAligned) ClearBehind(destination.columns - static_cast<int>(lane) * kOctet, pairs);
  const float own_scale = QuantScale(RowAmax(pairs), pow_2_scales);
  const uint32_t own_row = row + lane / kLanesPerRow;
  if (lane % kLanesPerRow == 0 && static_cast<int>(own_row) < destination.rows) {
    destination.dequant_scales[own_row] = 1.0f / own_scale;
  }
  uint2 octets[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    octets[r] = ConvertOctet(pairs[r], __shfl_sync(kAllLanes, own_scale, r * kLanesPerRow, kRowLanes));
  }
  StoreRows<kAligned>(octets, row, destination);
}

// The same for rows of zeros.
template <bool kAligned, int kRows>
__device__ __forceinline__ void StoreEmptyRows(uint32_t row, const RowDestination& destination) {
  const uint32_t lane = threadIdx.x % kRowLanes;
  if (lane < kRows && static_cast<int>(row + lane) < destination.rows) destination.dequant_scales[row + lane] = 1.0f;
  const uint2 octets[kRows] = {};
  StoreRows<kAligned>(octets, row, destination);
}

// Keeps the compiler from holding float forms of the pairs, made for the rows, until columns need them.
template <int kRows>
__device__ __forceinline__ void ForgetFloats(uint32_t (&pairs)[kRows][kPairs]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) asm volatile("" : "+r"(pairs[r][i]));
  }
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_ROWS_CUH_
