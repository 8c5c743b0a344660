#include "cpu/columns.h"

#include <algorithm>
#include <vector>

#include "core/groups.h"
#include "core/numerics.h"
#include "cpu/grid.h"

namespace jax_tsq::cpu {
namespace {

// Where a group lies in x and in the result.
struct Group {
  int64_t first_row;
  int64_t rows;
  int64_t first_padded;
  int64_t padded;
};

// All groups of all batches, each batch's followed by one without rows that takes what is left of the result. Writes
// `padded_sizes`.
std::vector<Group> LayOut(const Input& input, const GroupSizes& groups, const ColumnResult& result) {
  std::vector<Group> layout;
  layout.reserve(input.batch * (groups.groups + 1));
  const int32_t* group_size = groups.sizes;
  int32_t* padded_size = result.padded_sizes;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    Group next = {};
    for (int64_t i = 0; i < groups.groups; ++i) {
      next.rows = TakeGroup(*group_size++, input.tokens - next.first_row, groups.aligned);
      next.padded = PadToBlock(next.rows);
      *padded_size++ = static_cast<int32_t>(next.padded);
      layout.push_back(next);
      next.first_row += next.rows;
      next.first_padded += next.padded;
    }
    layout.push_back({next.first_row, 0, next.first_padded, result.padded_tokens - next.first_padded});
  }
  return layout;
}

}  // namespace

void QuantizeColumns(const Input& input, const GroupSizes& groups, const ColumnResult& result, const Executor& executor,
                     CpuLevel level) {
  const int64_t blocks = result.padded_tokens / kBlock;
  // An empty result, which any number of batches may have.
  if (groups.groups == 0 && (blocks == 0 || input.features == 0)) return;
  const std::vector<Group> layout = LayOut(input, groups, result);

  const auto block_at = [&](int64_t index) {
    const int64_t batch = index / blocks;
    const int64_t padded_row = index % blocks * kBlock;
    const auto first_group = layout.begin() + batch * (groups.groups + 1);
    // The last group that starts here or before: empty ones, which start where the next one does, are passed over.
    const auto starts_after = [](int64_t row, const Group& group) { return row < group.first_padded; };
    const Group& group =
        *(std::upper_bound(first_group, first_group + groups.groups + 1, padded_row, starts_after) - 1);
    const int64_t token = padded_row - group.first_padded;
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, std::max<int64_t>(0, group.rows - token)));

    TokenBlock block = RowsOf(input, batch * input.tokens + group.first_row + token, rows);
    block.values = result.values + batch * input.features * result.padded_tokens;
    block.values += result.flat ? input.features * group.first_padded + token : padded_row;
    block.values_stride = result.flat ? group.padded : result.padded_tokens;
    block.tokens = kBlock;
    block.dequant_scales = result.dequant_scales + index * input.features;
    return block;
  };
  QuantizeBlocks(input, input.batch * blocks, block_at, executor, level);
}

}  // namespace jax_tsq::cpu
