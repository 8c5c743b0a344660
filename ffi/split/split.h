// fused_transpose_split_quant: static token counts, one result for each expert.

#ifndef JAX_TSQ_SPLIT_SPLIT_H_
#define JAX_TSQ_SPLIT_SPLIT_H_

#include <cstdint>
#include <vector>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "core/stream.h"

namespace jax_tsq {

struct Expert {
  int64_t first_token;    // row of x
  int64_t tokens;         // 0 for an unused expert, whose pointers may be null
  uint8_t* out;           // [batch, features, tokens] float8_e4m3fn
  float* dequant_scales;  // [batch, CeilDiv(tokens, kBlock), features]
};

struct SplitProblem {
  Input input;
  std::vector<Expert> experts;  // in order; their tokens add up to input.tokens
};

// `level` is one that this machine can run.
void SplitOnCpu(const SplitProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* SplitOnCuda(const SplitProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_SPLIT_SPLIT_H_
