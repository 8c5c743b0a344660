// ragged_transpose_quant on the host: one result whose groups start at whole blocks.

#include <algorithm>
#include <vector>

#include "core/groups.h"
#include "cpu/grid.h"
#include "ragged/ragged.h"

namespace jax_tsq {
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
std::vector<Group> LayOut(const RaggedProblem& problem) {
  std::vector<Group> layout;
  layout.reserve(problem.input.batch * (problem.groups + 1));
  const int32_t* group_size = problem.group_sizes;
  int32_t* padded_size = problem.padded_sizes;
  for (int64_t batch = 0; batch < problem.input.batch; ++batch) {
    Group next = {};
    for (int64_t i = 0; i < problem.groups; ++i) {
      next.rows = TakeGroup(*group_size++, problem.input.tokens - next.first_row, problem.aligned);
      next.padded = PadToBlock(next.rows);
      *padded_size++ = static_cast<int32_t>(next.padded);
      layout.push_back(next);
      next.first_row += next.rows;
      next.first_padded += next.padded;
    }
    layout.push_back({next.first_row, 0, next.first_padded, problem.padded_tokens - next.first_padded});
  }
  return layout;
}

}  // namespace

void RaggedOnCpu(const RaggedProblem& problem, const Executor& executor, CpuLevel level) {
  const Input& input = problem.input;
  const int64_t blocks = problem.padded_tokens / kBlock;
  // An empty result, which any number of batches may have.
  if (problem.groups == 0 && (blocks == 0 || input.features == 0)) return;
  const std::vector<Group> layout = LayOut(problem);

  const auto block_at = [&](int64_t index) {
    const int64_t batch = index / blocks;
    const int64_t padded_row = index % blocks * kBlock;
    const auto first_group = layout.begin() + batch * (problem.groups + 1);
    // The last group that starts here or before: empty ones, which start where the next one does, are passed over.
    const auto starts_after = [](int64_t row, const Group& group) { return row < group.first_padded; };
    const Group& group =
        *(std::upper_bound(first_group, first_group + problem.groups + 1, padded_row, starts_after) - 1);
    const int64_t token = padded_row - group.first_padded;
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, std::max<int64_t>(0, group.rows - token)));

    cpu::TokenBlock result = cpu::RowsOf(input, batch * input.tokens + group.first_row + token, rows);
    result.values = problem.values + batch * input.features * problem.padded_tokens;
    result.values += problem.flat ? input.features * group.first_padded + token : padded_row;
    result.values_stride = problem.flat ? group.padded : problem.padded_tokens;
    result.tokens = kBlock;
    result.dequant_scales = problem.dequant_scales + index * input.features;
    return result;
  };
  cpu::QuantizeBlocks(input, input.batch * blocks, block_at, executor, level);
}

}  // namespace jax_tsq
