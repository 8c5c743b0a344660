// The tile on the host: one block of up to kBlock tokens x kTileColumns features, quantized and transposed.

#ifndef JAX_TSQ_CPU_TILE_H_
#define JAX_TSQ_CPU_TILE_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/input.h"
#include "core/numerics.h"
#include "cpu/prefetch.h"

namespace jax_tsq::cpu {

// Columns of a tile: a cache line of fp8 input, two of bf16. Divides kBlock, so that a tile has one input scale a row.
inline constexpr int kTileColumns = 64;

// Tokens that share their scales, over all features.
struct TokenBlock {
  const void* x;              // first row; rows follow each other
  const float* input_scales;  // of the first row, for kFp8
  int rows;                   // 0 to kBlock; with 0, x is not looked at
  uint8_t* values;            // [features, tokens]; features are `values_stride` bytes apart
  int64_t values_stride;
  int tokens;             // from `rows` to kBlock; values from `rows` on are 0
  float* dequant_scales;  // [features]
};

// Writes the tile of `block` (rows > 0) that starts at feature `column`. `streaming` stores around the caches.
using TileFunction = void (*)(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch,
                              bool streaming);

// For a level that this machine can run. All of them write the same bytes.
TileFunction TileFor(CpuLevel level) noexcept;
#ifdef JAX_TSQ_X86_LEVELS
TileFunction Avx512Tile() noexcept;
#endif

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_TILE_H_
