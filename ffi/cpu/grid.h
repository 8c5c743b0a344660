// How the tiles of all blocks are spread over threads. The operations say where each block lies.

#ifndef JAX_TSQ_CPU_GRID_H_
#define JAX_TSQ_CPU_GRID_H_

#include <cstdint>
#include <functional>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "cpu/tile.h"

namespace jax_tsq::cpu {

// A block that reads `rows` rows of x, all batches counted, from `first_row` on; its output is for the caller to fill
// in.
TokenBlock RowsOf(const Input& input, int64_t first_row, int rows) noexcept;

// Writes features [begin, end) of a block without rows.
void FillEmpty(const TokenBlock& block, int64_t begin, int64_t end);

// Quantizes block_at(0) ... block_at(blocks - 1) on the executor's threads.
void QuantizeBlocks(const Input& input, int64_t blocks, const std::function<TokenBlock(int64_t)>& block_at,
                    const Executor& executor, CpuLevel level);

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_GRID_H_
