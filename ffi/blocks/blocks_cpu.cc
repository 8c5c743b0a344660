// quantize_blocks on the host: which elements of which arrays make a block.

#include <algorithm>
#include <cstring>

#include "blocks/blocks.h"
#include "core/numerics.h"
#include "cpu/denormals.h"
#include "cpu/square.h"
#include "cpu/store.h"

namespace jax_tsq {
namespace {

// Blocks that a chunk takes of a row of blocks: a page of each row of float32.
constexpr int64_t kChunkBlocks = 8;

// A block of the joined array.
struct Place {
  int64_t first_row;  // all experts counted
  int64_t first_column;
  int rows;
  int columns;
};

void Load(const BlocksProblem& problem, const Place& place, const cpu::SquareFunctions& functions,
          cpu::SquareElements& elements) {
  if (place.rows < kBlock || place.columns < kBlock) std::memset(elements.words, 0, sizeof(elements.words));
  int64_t part_column = 0;  // where a part begins in the joined array
  for (int i = 0; i < problem.num_parts; ++i) {
    const WeightPart& part = problem.parts[i];
    const int64_t begin = std::max(place.first_column, part_column);
    const int64_t end = std::min(place.first_column + place.columns, part_column + part.columns);
    const auto count = static_cast<int>(end - begin);
    for (int row = 0; count > 0 && row < place.rows; ++row) {
      const int64_t offset = (place.first_row + row) * part.columns + begin - part_column;
      cpu::Bf16Bits* to = elements.row(row) + (begin - place.first_column);
      if (problem.type == WeightType::kFloat32) {
        functions.round(static_cast<const float*>(part.weights) + offset, count, to);
      } else {
        std::memcpy(to, static_cast<const uint16_t*>(part.weights) + offset, count * sizeof(uint16_t));
      }
    }
    part_column += part.columns;
  }
}

}  // namespace

void BlocksOnCpu(const BlocksProblem& problem, const Executor& executor, CpuLevel level) {
  const int64_t rows = problem.rows, columns = problem.columns;
  if (problem.experts == 0 || rows == 0 || columns == 0) return;
  const cpu::SquareFunctions functions = cpu::SquareFor(level);
  const int64_t row_blocks = CeilDiv(rows, kBlock);
  const int64_t column_blocks = CeilDiv(columns, kBlock);
  const int64_t chunks_per_row = CeilDiv(column_blocks, kChunkBlocks);

  const bool streaming = problem.experts * rows * columns > cpu::kStreamingBytes;

  executor.Run(problem.experts * row_blocks * chunks_per_row, [&](int64_t chunk) {
    const cpu::DenormalGuard guard;
    const int64_t row_of_blocks = chunk / chunks_per_row;  // all experts counted
    const int64_t expert = row_of_blocks / row_blocks;
    const int64_t row = row_of_blocks % row_blocks * kBlock;
    const int64_t first_block = chunk % chunks_per_row * kChunkBlocks;
    const int64_t end_block = std::min(first_block + kChunkBlocks, column_blocks);
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t column = block * kBlock;
      const Place place = {expert * rows + row, column, static_cast<int>(std::min<int64_t>(kBlock, rows - row)),
                           static_cast<int>(std::min<int64_t>(kBlock, columns - column))};
      cpu::SquareElements elements;
      Load(problem, place, functions, elements);
      functions.quantize(elements, problem.pow_2_scales,
                         {place.rows, place.columns, problem.values + place.first_row * columns + column, columns,
                          problem.transposed + (expert * columns + column) * rows + row, rows,
                          problem.dequant_scales + row_of_blocks * column_blocks + block, streaming});
    }
    cpu::FinishStores();
  });
}

}  // namespace jax_tsq
