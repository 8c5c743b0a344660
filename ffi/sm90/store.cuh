// From a warpgroup's registers to global memory: through shared memory, from which the copy engine stores whole boxes.

#ifndef JAX_TSQ_SM90_STORE_CUH_
#define JAX_TSQ_SM90_STORE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "sm90/tma.cuh"
#include "sm90/wgmma.cuh"

namespace jax_tsq::sm90 {

// A warpgroup's sums are stored in chunks of 128 bytes by 64 rows, the widest that the copy engine swizzles.
inline constexpr int kChunkRowBytes = 128;
using Chunk = uint8_t[kProductRows * kChunkRowBytes];  // from an address that is a multiple of 1024

// Writes the sums of a warpgroup's thread from `column` on as T, for two chunks.
template <class T>
__device__ __forceinline__ void WriteChunks(const Product& sums, int thread, int column, Chunk (&chunks)[2]) {
  constexpr int kColumns = kChunkRowBytes / sizeof(T);
  const int row = thread / kWarp * 16 + thread % kWarp / 4;
  const int q = thread % 4;
  // Within 8 rows, the copy engine exchanges pieces of 16 bytes: number i of row r is at i ^ r. So 8 columns of float32
  // lie in the same banks for rows r and r ^ 1. A warp writes four rows at a time: odd ones take their columns in
  // another order, or they would wait for the even ones.
  const bool reorder = sizeof(T) == sizeof(float) && row % 2 != 0;
  const int exchange = row % 8 ^ (reorder ? 4 : 0);
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = (column + chunk * kColumns) / 2 + i;
        sum[i] = reorder ? sums[first + (j ^ 2) * 4] : sums[first + j * 4];
      }
      const int byte = (8 * j + 2 * q) * sizeof(T);
      uint8_t* const to = chunks[chunk] + row * kChunkRowBytes + ((byte / 16 ^ exchange) * 16 + byte % 16);
      if constexpr (sizeof(T) == sizeof(float)) {
        *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
        *reinterpret_cast<float2*>(to + 8 * kChunkRowBytes) = make_float2(sum[2], sum[3]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[0], sum[1]);
        *reinterpret_cast<__nv_bfloat162*>(to + 8 * kChunkRowBytes) = __floats2bfloat162_rn(sum[2], sum[3]);
      }
    }
  }
}

// Stores a warpgroup's sums as T, two chunks at a time. One thread calls store(column, chunk), which enqueues a store
// of the chunk that starts at this column.
template <class T, class StoreChunk>
__device__ __forceinline__ void StoreSums(const Product& sums, int warpgroup, Chunk (&chunks)[2],
                                          const StoreChunk& store) {
  constexpr int kColumns = kChunkRowBytes / sizeof(T);
  const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
  for (int column = 0; column < kProductColumns; column += 2 * kColumns) {
    if (thread == 0) WaitForStores();  // the chunks' former content is on its way
    SyncWarpgroup(warpgroup);
    WriteChunks<T>(sums, thread, column, chunks);
    FenceSharedWrites();
    SyncWarpgroup(warpgroup);
    if (thread == 0) {
      store(column, chunks[0]);
      store(column + kColumns, chunks[1]);
    }
  }
}

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_STORE_CUH_
