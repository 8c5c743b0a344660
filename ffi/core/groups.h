// The rule for group sizes, for host and device code: what a group takes of x, and where it lies in a padded result.

#ifndef JAX_TSQ_CORE_GROUPS_H_
#define JAX_TSQ_CORE_GROUPS_H_

#include <cstdint>

#include "core/numerics.h"

namespace jax_tsq {

// Rows that a group of size `size` takes when `room` rows of x are left: negative sizes count as 0, `aligned` rounds
// down to whole blocks, and no group reaches past the end of x.
JAX_TSQ_HOST_DEVICE int64_t TakeGroup(int32_t size, int64_t room, bool aligned) {
  int64_t rows = size > 0 ? size : 0;
  if (aligned) rows -= rows % kBlock;
  return rows < room ? rows : room;
}

// Groups start at whole blocks of a padded result.
JAX_TSQ_HOST_DEVICE constexpr int64_t PadToBlock(int64_t rows) { return CeilDiv(rows, kBlock) * kBlock; }

// The smallest padded result that holds any sizes: at most min(groups, tokens) groups are not empty.
JAX_TSQ_HOST_DEVICE constexpr int64_t PaddedTokens(int64_t tokens, int64_t groups, bool aligned) {
  if (aligned) return PadToBlock(tokens);
  return (tokens + (kBlock - 1) * (groups < tokens ? groups : tokens)) / kBlock * kBlock;
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_GROUPS_H_
