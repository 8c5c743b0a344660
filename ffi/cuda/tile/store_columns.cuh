// Transposed features from shared memory to any address.

#ifndef JAX_TSQ_CUDA_TILE_STORE_COLUMNS_CUH_
#define JAX_TSQ_CUDA_TILE_STORE_COLUMNS_CUH_

#include <cstdint>

#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

// 16 tokens of a feature.
template <class Shape>
__device__ __forceinline__ uint4 ReadVector(const TileWords<Shape>& storage, uint32_t column, uint32_t vector) {
  constexpr int kVectorsPerBlock = kBlock / kVectorBytes;
  const uint32_t* words = storage.words[vector / kVectorsPerBlock][column];
  const uint32_t swizzled = vector % kVectorsPerBlock ^ column / kOctet % 8;
  const uint4 v = *reinterpret_cast<const uint4*>(words + swizzled * 4);
  const bool upper = Shape::kColumns > 64 && column >= 64;  // there the swizzle exchanges the halves
  return upper ? make_uint4(v.z, v.w, v.x, v.y) : v;
}

// The tokens of a feature at any address: between `head` and `tail` they fill aligned vectors.
struct Run {
  __device__ __forceinline__ Run(const uint8_t* address, int tokens) {
    head = min(-static_cast<int>(reinterpret_cast<uintptr_t>(address)) & (kVectorBytes - 1), tokens);
    tail = head + ((tokens - head) & -kVectorBytes);
  }
  int head, tail;
};

// Stores the tile, or zeros in its place.
template <class Shape, bool kZero = false>
__device__ __forceinline__ void StoreColumns(uint32_t features, uint32_t first_column,
                                             const ColumnDestination& destination, const TileWords<Shape>& storage) {
  const uint32_t columns = min(features - first_column, uint32_t{Shape::kColumns});
  const uint64_t pitch = destination.pitch;
  const int tokens = destination.tokens;
  uint8_t* out = destination.out + first_column * pitch;

  // Whole vectors
  constexpr int kPasses = 2 * Shape::kTurns;
  constexpr uint32_t kStep = Shape::kColumns / kPasses;
  static_assert(kPasses * Shape::kThreads == Shape::kColumns * Shape::kVectors);
  const uint32_t first = threadIdx.x / Shape::kVectors;
  const uint32_t vector = threadIdx.x % Shape::kVectors;
  if constexpr (Shape::kStoresAligned) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t column = first + pass * kStep;
      if (column < columns && static_cast<int>(vector * kVectorBytes) < tokens) {
        const uint4 v = kZero ? uint4{} : ReadVector(storage, column, vector);
        __stcs(reinterpret_cast<uint4*>(out + column * pitch) + vector, v);
      }
    }
    return;
  }

  // Features without a gap between them: a vector can hold the last tokens of one and the first of the next.
  const bool joined = Shape::kShortExperts && pitch == static_cast<uint32_t>(tokens) && tokens >= kVectorBytes;
  static_assert(kStep % kVectorBytes == 0, "features of both passes start at the same alignment");
  const Run run(out + first * pitch, tokens);
  const int token = run.head + static_cast<int>(vector * kVectorBytes);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const uint32_t column = first + pass * kStep;
    const bool join = joined && column + 1 < columns;
    if (column < columns && token < (join ? tokens : run.tail)) {
      uint32_t words[8] = {};
      if constexpr (!kZero) {
        reinterpret_cast<uint4&>(words[0]) = ReadVector(storage, column, vector);
        // What follows the tokens: zeros where features may join, elsewhere anything.
        const bool more = !Shape::kShortExperts || static_cast<int>((vector + 1) * kVectorBytes) < tokens;
        if (more) {
          const uint32_t next = min(vector + 1, Shape::kVectors - 1);
          reinterpret_cast<uint4&>(words[4]) = ReadVector(storage, column, next);
        }
        ShiftDown<4, 4>(words, run.head);
        if (Shape::kShortExperts && token >= run.tail) {
          uint32_t joining[8] = {};
          reinterpret_cast<uint4&>(joining[4]) = ReadVector(storage, column + 1, 0);
          ShiftDown<4, 4>(joining, kVectorBytes - (tokens - token));
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i] |= joining[i];
        }
      }
      __stcs(reinterpret_cast<uint4*>(out + column * pitch + token),
             make_uint4(words[0], words[1], words[2], words[3]));
    }
  }

  // Ragged ends: the bytes of a feature before its first vector and after its last, in one store of a warp. Joined
  // features have them where the tile begins and ends.
  constexpr uint32_t kStride = Shape::kWarps > kVectorBytes ? Shape::kWarps : kVectorBytes;  // of one alignment
  const uint32_t lane = threadIdx.x % kWarp;
  const bool is_head = lane < kVectorBytes;
#pragma unroll
  for (uint32_t start = threadIdx.x / kWarp; start < kStride; start += Shape::kWarps) {
    const Run ends(out + start * pitch, tokens);
    const uint32_t token = is_head ? lane : ends.tail + lane - kVectorBytes;
    if (static_cast<int>(token) >= (is_head ? ends.head : tokens)) continue;
    const uint32_t only = is_head ? 0 : columns - 1;
    if (joined && only % kStride != start) continue;
    const uint32_t end = joined ? only + 1 : columns;
#pragma unroll
    for (uint32_t column = joined ? only : start; column < Shape::kColumns; column += kStride) {
      if (column >= end) continue;
      const uint32_t* words = storage.words[token / kBlock][column];
      const auto* bytes = reinterpret_cast<const uint8_t*>(words + SwizzledWord(column, token % kBlock / kQuad));
      __stcs(out + column * pitch + token, kZero ? uint8_t{0} : bytes[token % kQuad]);
    }
  }
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_STORE_COLUMNS_CUH_
