// What the phases of a tile share: its shape, its shared memory, where it comes from and where it goes.
//
// A tile is tokens x features. A thread owns quads: four consecutive tokens of eight consecutive features, as pairs of
// bf16. That makes 16-byte loads along a row, and four tokens of one feature are one 32-bit word of a transposed
// output.

#ifndef JAX_TSQ_CUDA_TILE_SHAPE_CUH_
#define JAX_TSQ_CUDA_TILE_SHAPE_CUH_

#include <cstdint>

#include "core/numerics.h"
#include "cuda/launch.cuh"

namespace jax_tsq::cuda {

inline constexpr int kQuad = 4;          // tokens of a quad
inline constexpr int kOctet = 8;         // features of a quad
inline constexpr int kPairs = 4;         // the octet as packed pairs of bf16
inline constexpr int kVectorBytes = 16;  // the widest store, and so many tokens of one feature

// Lanes that hold a block of features of one row.
inline constexpr int kRowLanes = kBlock / kOctet;

// The tokens of an expert are known to be a multiple of `token_multiple`: kBlock, kVectorBytes or 1. A thread takes a
// quad in each of `turns` parts of the tile.
template <int token_multiple, int token_blocks, int columns, int turns = 1>
struct TileShape {
  static constexpr bool kWholeBlocks = token_multiple % kBlock == 0;
  static constexpr bool kStoresAligned = token_multiple % kVectorBytes == 0;  // 16 tokens are one aligned vector
  static constexpr int kTokenBlocks = token_blocks;
  static constexpr bool kShortExperts = token_blocks <= 2;  // that a tile often holds whole
  static constexpr int kColumns = columns;

  static constexpr int kTurns = turns;

  static constexpr int kTokens = kBlock * token_blocks;
  static constexpr int kOctets = columns / kOctet;
  static constexpr int kThreads = kTokens / kQuad * kOctets / turns;
  static constexpr int kTurnTokens = kTokens / turns;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kVectors = kTokens / kVectorBytes;  // of one feature
};

// Four tokens of a feature are a word; see SwizzledWord for their order.
template <class Shape>
struct alignas(kVectorBytes) TileWords {
  uint32_t words[Shape::kTokenBlocks][Shape::kColumns][kBlock / kQuad];
};

// What the quantization along columns needs.
template <class Shape>
struct ColumnStorage : TileWords<Shape> {
  float quant_scales[Shape::kTokenBlocks][kPairs][Shape::kOctets][2];  // neighbouring lanes read neighbouring pairs
  uint32_t warp_amax[Shape::kWarps * Shape::kTurns][Shape::kColumns / 2];
};

struct TileSource {
  int64_t first_row;  // of x, counted over all batches
  int rows;           // to load, at most Shape::kTokens; the rest of the tile is zero
  uint32_t first_column;
  int64_t begin_row, end_row;  // rows of x that may be touched
};

struct ColumnDestination {
  uint8_t* out;           // the tile's first token of feature 0
  uint32_t pitch;         // bytes from one feature to the next
  int tokens;             // to store for each feature
  float* dequant_scales;  // [token blocks of the tile, features]
};

struct RowDestination {
  uint8_t* values;        // the tile's first row and feature
  uint32_t pitch;         // bytes from one row to the next
  float* dequant_scales;  // one for each row of the tile
  int rows;               // to store
  int columns;            // to store of each row
};

// Position of a feature's word. Both the warps that write words of one quad and those that read 16 bytes along a
// feature then meet every bank once.
__device__ __forceinline__ uint32_t SwizzledWord(uint32_t column, uint32_t word) {
  return word ^ (column / kOctet % 8 * 4) ^ (column / 64 * 2);
}

// Moves words down by `bytes` < 4 * kSpare; the first kWords are the result.
template <int kWords, int kSpare>
__device__ __forceinline__ void ShiftDown(uint32_t (&words)[kWords + kSpare], uint32_t bytes) {
#pragma unroll
  for (int step = kSpare / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kWords + step; ++i) words[i] = bytes & 4 * step ? words[i + step] : words[i];
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], 8 * (bytes & 3));
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_SHAPE_CUH_
