#include "cpu/groups.h"

#include <algorithm>

#include "core/numerics.h"

namespace jax_tsq::cpu {

PaddedLayout::PaddedLayout(const GroupSizes& groups, int64_t batch, int64_t tokens, int64_t padded_tokens,
                           int32_t* padded_sizes)
    : tokens_(tokens), blocks_(padded_tokens / kBlock), groups_(groups.groups + 1) {
  placed_.reserve(batch * groups_);
  const int32_t* group_size = groups.sizes;
  for (int64_t i = 0; i < batch; ++i) {
    Group next = {};
    for (int64_t group = 0; group < groups.groups; ++group) {
      next.rows = TakeGroup(*group_size++, tokens - next.first_row, groups.aligned);
      next.padded = PadToBlock(next.rows);
      *padded_sizes++ = static_cast<int32_t>(next.padded);
      placed_.push_back(next);
      next.first_row += next.rows;
      next.first_padded += next.padded;
    }
    placed_.push_back({next.first_row, 0, next.first_padded, padded_tokens - next.first_padded});
  }
}

PaddedBlock PaddedLayout::At(int64_t index) const {
  const int64_t batch = index / blocks_;
  const int64_t padded_row = index % blocks_ * kBlock;
  const auto first_group = placed_.begin() + batch * groups_;
  // The last group that starts here or before: empty ones, which start where the next one does, are passed over.
  const auto starts_after = [](int64_t row, const Group& group) { return row < group.first_padded; };
  const Group& group = *(std::upper_bound(first_group, first_group + groups_, padded_row, starts_after) - 1);
  const int64_t token = padded_row - group.first_padded;
  const auto rows = static_cast<int>(std::clamp<int64_t>(group.rows - token, 0, kBlock));
  return {batch * tokens_ + group.first_row + token, rows, group.first_padded, group.padded};
}

}  // namespace jax_tsq::cpu
