#include "cpu/columns.h"

#include "core/numerics.h"
#include "cpu/grid.h"

namespace jax_tsq::cpu {
void QuantizeColumns(const Input& input, const GroupSizes& groups, const ColumnResult& result, const Executor& executor,
                     CpuLevel level) {
  const int64_t blocks = result.padded_tokens / kBlock;
  // An empty result, which any number of batches may have.
  if (groups.groups == 0 && (blocks == 0 || input.features == 0)) return;
  const PaddedLayout layout(groups, input.batch, input.tokens, result.padded_tokens, result.padded_sizes);

  const auto block_at = [&](int64_t index) {
    const PaddedBlock padded = layout.At(index);
    const int64_t padded_row = index % blocks * kBlock;
    TokenBlock block = RowsOf(input, padded.first_row, padded.rows);
    block.values = result.values + index / blocks * input.features * result.padded_tokens;
    block.values += result.flat ? input.features * padded.group_start + padded_row - padded.group_start : padded_row;
    block.values_stride = result.flat ? padded.group_padded : result.padded_tokens;
    block.tokens = kBlock;
    block.dequant_scales = result.dequant_scales + index * input.features;
    return block;
  };
  QuantizeBlocks(input, input.batch * blocks, block_at, executor, level);
}

}  // namespace jax_tsq::cpu
