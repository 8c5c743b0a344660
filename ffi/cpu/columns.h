// Columns on the host: groups quantized along tokens into one result, where they start at whole blocks.

#ifndef JAX_TSQ_CPU_COLUMNS_H_
#define JAX_TSQ_CPU_COLUMNS_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "cpu/groups.h"

namespace jax_tsq::cpu {

struct ColumnResult {
  int64_t padded_tokens;  // P, a multiple of kBlock, at least PaddedTokens(...)
  bool flat;              // group i of `values` is a contiguous [features, padded_i]
  uint8_t* values;        // [batch, features, P] or [batch, features * P]
  float* dequant_scales;  // [batch, P / kBlock, features]
  int32_t* padded_sizes;  // [batch, groups]
};

// Rows that are in no group are not read.
void QuantizeColumns(const Input& input, const GroupSizes& groups, const ColumnResult& result, const Executor& executor,
                     CpuLevel level);

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_COLUMNS_H_
