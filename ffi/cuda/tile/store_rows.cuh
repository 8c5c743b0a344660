// Rows of float8_e4m3fn from registers to any address.

#ifndef JAX_TSQ_CUDA_TILE_STORE_ROWS_CUH_
#define JAX_TSQ_CUDA_TILE_STORE_ROWS_CUH_

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

// Every octet of the result is one aligned vector.
template <int kRows>
__device__ __forceinline__ void StoreAlignedRows(const uint2 (&octets)[kRows], uint32_t row, int column,
                                                 const RowDestination& destination) {
  const int rows = column < destination.columns ? destination.rows - static_cast<int>(row) : 0;
  uint8_t* address = Anchor(destination.values + row * uint64_t{destination.pitch} + column);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) *reinterpret_cast<uint2*>(address + r * uint64_t{destination.pitch}) = octets[r];
  }
}

// Aligned vectors around the octet's beginning and end; bytes where the row's part in the tile does not fill them.
template <int kRows>
__device__ __forceinline__ void StoreShiftedRows(const uint2 (&octets)[kRows], uint32_t row, int column,
                                                 const RowDestination& destination) {
  const int rows = destination.rows - static_cast<int>(row);
  const int columns = destination.columns;
  uint8_t* address = destination.values + row * uint64_t{destination.pitch} + column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    uint8_t* octet = address + r * uint64_t{destination.pitch};
    const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(octet) % kOctet);  // the same for all of a row
    uint32_t words[4] = {__shfl_up_sync(kAllLanes, octets[r].x, 1, kRowLanes),
                         __shfl_up_sync(kAllLanes, octets[r].y, 1, kRowLanes), octets[r].x, octets[r].y};
    const bool whole = column >= offset && column - offset + kOctet <= columns;
    const bool next_whole = column - offset + 2 * kOctet <= columns;
    if (r < rows && whole) {
      if (offset > 0) {
        ShiftDown<2, 2>(words, kOctet - offset);
      } else {
        words[0] = words[2];
        words[1] = words[3];
      }
      *reinterpret_cast<uint2*>(octet - offset) = make_uint2(words[0], words[1]);
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (r < rows && column + i < columns && !(i + offset < kOctet ? whole : next_whole)) {
        octet[i] = static_cast<uint8_t>((i < 4 ? octets[r].x : octets[r].y) >> (i % 4 * 8));
      }
    }
  }
}

// Called by whole warps: stores an octet of each of the rows from `row` on; kRowLanes lanes hold those of a row.
template <bool kAligned, int kRows>
__device__ __forceinline__ void StoreRows(const uint2 (&octets)[kRows], uint32_t row,
                                          const RowDestination& destination) {
  const int column = static_cast<int>(threadIdx.x % kRowLanes) * kOctet;
  if constexpr (kAligned) {
    StoreAlignedRows(octets, row, column, destination);
  } else {
    StoreShiftedRows(octets, row, column, destination);
  }
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_STORE_ROWS_CUH_
