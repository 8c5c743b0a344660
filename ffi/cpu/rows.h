// Rows on the host, quantized where they are, with a scale for each block of features.

#ifndef JAX_TSQ_CPU_ROWS_H_
#define JAX_TSQ_CPU_ROWS_H_

#include <cstdint>
#include <functional>

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

// Features [column, column + features) of a row, counted over all batches, as bf16: where they are, or in `scratch`,
// which is aligned to cache lines and has room for them. `column` is a multiple of kBlock.
using RowSource = std::function<const void*(int64_t row, int64_t column, int features, void* scratch)>;

// The same with rows that `source` makes; `input` has no x.
void QuantizeRows(const Input& input, const RowSource& source, const GroupSizes* groups, const RowResult& result,
                  const Executor& executor, CpuLevel level);

// Quantizes one row of `features` bf16, with a scale for each block. For a level that this machine can run.
using RowFunction = void (*)(const uint8_t* x, int features, bool pow_2_scales, uint8_t* values, float* dequant_scales);
RowFunction RowFor(CpuLevel level) noexcept;

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_ROWS_H_
