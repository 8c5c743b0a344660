// quantize_blocks: weights in both orientations, with a scale for each 128 x 128 block.

#ifndef JAX_TSQ_BLOCKS_BLOCKS_H_
#define JAX_TSQ_BLOCKS_BLOCKS_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"

namespace jax_tsq {

// Most arrays that are joined in one call.
inline constexpr int kMostParts = 16;

enum class WeightType { kFloat32, kBf16 };

// Some of the columns, in an array of their own.
struct WeightPart {
  const void* weights;  // [experts, rows, columns], row-major
  int64_t columns;
};

struct BlocksProblem {
  WeightType type;               // float32 is rounded to bfloat16 first
  WeightPart parts[kMostParts];  // joined along the columns; blocks are those of the joined array
  int num_parts;
  int64_t experts;  // all leading dimensions
  int64_t rows;
  int64_t columns;  // of all parts
  bool pow_2_scales;
  uint8_t* values;        // [experts, rows, columns] float8_e4m3fn
  uint8_t* transposed;    // [experts, columns, rows], the same values
  float* dequant_scales;  // [experts, CeilDiv(rows, kBlock), CeilDiv(columns, kBlock)]
};

// `level` is one that this machine can run.
void BlocksOnCpu(const BlocksProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* BlocksOnCuda(const BlocksProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_BLOCKS_BLOCKS_H_
