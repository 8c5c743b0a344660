// quantize_rows: float8_e4m3fn with a scale for each block of features of each row.

#ifndef JAX_TSQ_ROWS_ROWS_H_
#define JAX_TSQ_ROWS_ROWS_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "core/stream.h"

namespace jax_tsq {

struct RowsProblem {
  Input input;                 // of kBf16
  const int32_t* group_sizes;  // [batch, groups], any values, see core/groups.h; null: all rows are wanted
  int64_t groups;
  bool aligned;           // sizes count in whole blocks
  uint8_t* values;        // [batch, tokens, features] float8_e4m3fn; 0 past the sum of the sizes
  float* dequant_scales;  // [batch, CeilDiv(features, kBlock), tokens]; 1 past the sum of the sizes
};

// `level` is one that this machine can run.
void RowsOnCpu(const RowsProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* RowsOnCuda(const RowsProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_ROWS_ROWS_H_
