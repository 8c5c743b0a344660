// The last phase of a tile: features from shared memory to any address.

#ifndef JAX_TSQ_TILE_STORE_CUH_
#define JAX_TSQ_TILE_STORE_CUH_

#include <cstdint>

#include "tile_shape.cuh"

namespace jax_tsq {

// 16 tokens of a feature. `upper` says whether the feature is past the 64th, where the swizzle exchanges the halves.
template <class Shape>
__device__ __forceinline__ uint4 ReadVector(const TileStorage<Shape>& storage, uint32_t column, uint32_t vector,
                                            bool upper) {
  constexpr int kVectorsPerBlock = kBlock / kVectorBytes;
  const uint32_t* words = storage.words[vector / kVectorsPerBlock][column];
  const uint32_t swizzled = vector % kVectorsPerBlock ^ column / kOctet % 8;
  const uint4 v = *reinterpret_cast<const uint4*>(words + swizzled * 4);
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
__device__ __forceinline__ void StoreTile(const Input& input, uint32_t first_column, const TileDestination& destination,
                                          const TileStorage<Shape>& storage) {
  const uint32_t columns = static_cast<uint32_t>(input.features) - first_column;  // perhaps more than the tile has
  uint8_t* out = destination.out + uint64_t{first_column} * destination.pitch;

  // Whole vectors
  constexpr int kPasses = 2;
  static_assert(kPasses * Shape::kThreads == Shape::kColumns * Shape::kVectors);
  const uint32_t vector = threadIdx.x % Shape::kVectors;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const uint32_t column = threadIdx.x / Shape::kVectors + pass * (Shape::kColumns / kPasses);
    const bool upper = Shape::kColumns > 64 && pass == 1;
    uint8_t* run = out + uint64_t{column} * destination.pitch;
    if constexpr (Shape::kStoresAligned) {
      if (column < columns && static_cast<int>(vector * kVectorBytes) < destination.tokens) {
        const uint4 v = kZero ? uint4{} : ReadVector(storage, column, vector, upper);
        __stcs(reinterpret_cast<uint4*>(run) + vector, v);
      }
    } else {
      const Run tokens(run, destination.tokens);
      const uint32_t token = tokens.head + vector * kVectorBytes;
      if (column < columns && static_cast<int>(token) < tokens.tail) {
        uint32_t words[8] = {};
        if constexpr (!kZero) {
          reinterpret_cast<uint4&>(words[0]) = ReadVector(storage, column, vector, upper);
          // Past the last vector only where nothing of it is needed.
          const uint32_t next = min(vector + 1, Shape::kVectors - 1);
          reinterpret_cast<uint4&>(words[4]) = ReadVector(storage, column, next, upper);
          ShiftDown<4, 4>(words, tokens.head);
        }
        __stcs(reinterpret_cast<uint4*>(run + token), make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
  if constexpr (Shape::kStoresAligned) return;

  // Ragged ends: the bytes of a feature before its first vector and after its last, in one store of a warp
  const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (uint32_t column = threadIdx.x / kWarp; column < Shape::kColumns; column += Shape::kWarps) {
    uint8_t* run = out + uint64_t{column} * destination.pitch;
    const Run tokens(run, destination.tokens);
    const bool first = lane < kVectorBytes;
    const uint32_t token = first ? lane : tokens.tail + lane - kVectorBytes;
    if (column < columns && static_cast<int>(token) < (first ? tokens.head : destination.tokens)) {
      const uint32_t* words = storage.words[token / kBlock][column];
      const auto* bytes = reinterpret_cast<const uint8_t*>(words + SwizzledWord(column, token % kBlock / kQuad));
      __stcs(run + token, kZero ? uint8_t{0} : bytes[token % kQuad]);
    }
  }
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_TILE_STORE_CUH_
