// Rows on the host, quantized where they are, with a scale for each block of features.

#ifndef JAX_TSQ_CPU_ROWS_H_
#define JAX_TSQ_CPU_ROWS_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "cpu/groups.h"

namespace jax_tsq::cpu {

struct RowResult {
  uint8_t* values;        // [batch, tokens, features]
  float* dequant_scales;  // [batch, CeilDiv(features, kBlock), tokens]
};

// Quantizes the rows of bf16 input that are in groups, or all without `groups`. Others are not read: their values are
// 0, their scales 1.
void QuantizeRows(const Input& input, const GroupSizes* groups, const RowResult& result, const Executor& executor,
                  CpuLevel level);

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_ROWS_H_
