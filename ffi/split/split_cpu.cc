// fused_transpose_split_quant on the host: blocks start over at each expert's first token.

#include <algorithm>
#include <vector>

#include "cpu/grid.h"
#include "split/split.h"

namespace jax_tsq {

void SplitOnCpu(const SplitProblem& problem, const Executor& executor, CpuLevel level) {
  const Input& input = problem.input;
  std::vector<int64_t> first_blocks;  // of each expert
  int64_t blocks = 0;
  for (const Expert& expert : problem.experts) {
    first_blocks.push_back(blocks);
    blocks += CeilDiv(expert.tokens, kBlock);
  }

  const auto block_at = [&](int64_t index) {
    const int64_t batch = index / blocks;
    const int64_t block = index % blocks;
    // The last expert that starts here or before: unused ones, which start where the next one does, are passed over.
    const auto after = std::upper_bound(first_blocks.begin(), first_blocks.end(), block);
    const Expert& expert = problem.experts[after - first_blocks.begin() - 1];
    const int64_t block_of_expert = block - *(after - 1);
    const int64_t token = block_of_expert * kBlock;
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, expert.tokens - token));

    cpu::TokenBlock result = cpu::RowsOf(input, batch * input.tokens + expert.first_token + token, rows);
    result.values = expert.out + batch * input.features * expert.tokens + token;
    result.values_stride = expert.tokens;
    result.tokens = rows;
    result.dequant_scales =
        expert.dequant_scales + (batch * CeilDiv(expert.tokens, kBlock) + block_of_expert) * input.features;
    return result;
  };
  cpu::QuantizeBlocks(input, input.batch * blocks, block_at, executor, level);
}

}  // namespace jax_tsq
