// ragged_transpose_quant: group sizes that only the device knows, one padded result.

#ifndef JAX_TSQ_RAGGED_RAGGED_H_
#define JAX_TSQ_RAGGED_RAGGED_H_

#include <algorithm>
#include <cstdint>

#include "core/executor.h"
#include "core/input.h"
#include "core/numerics.h"

struct CUstream_st;

namespace jax_tsq {

struct RaggedProblem {
  Input input;
  const int32_t* group_sizes;  // [batch, groups]; any values, see TakeGroup
  int64_t groups;
  int64_t padded_tokens;  // P, a multiple of kBlock, at least what PaddedTokens asks for
  bool aligned;           // sizes count in whole blocks
  bool flat;              // group i of `values` is a contiguous [features, padded_i]
  uint8_t* values;        // [batch, features, P] or [batch, features * P] float8_e4m3fn
  float* dequant_scales;  // [batch, P / kBlock, features]
  int32_t* padded_sizes;  // [batch, groups]
};

// Rows that a group of size `size` takes when `room` rows of x are left: negative sizes count as 0, `aligned` rounds
// down to whole blocks, and no group reaches past the end of x.
JAX_TSQ_HOST_DEVICE int64_t TakeGroup(int32_t size, int64_t room, bool aligned) {
  int64_t rows = size > 0 ? size : 0;
  if (aligned) rows -= rows % kBlock;
  return rows < room ? rows : room;
}

JAX_TSQ_HOST_DEVICE int64_t PadToBlock(int64_t rows) { return CeilDiv(rows, kBlock) * kBlock; }

// The smallest P that holds any sizes: at most min(groups, tokens) groups are not empty.
inline int64_t PaddedTokens(int64_t tokens, int64_t groups, bool aligned) {
  if (aligned) return PadToBlock(tokens);
  return (tokens + (kBlock - 1) * std::min(groups, tokens)) / kBlock * kBlock;
}

void RaggedOnCpu(const RaggedProblem& problem, const Executor& executor);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* RaggedOnCuda(const RaggedProblem& problem, CUstream_st* stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_RAGGED_RAGGED_H_
