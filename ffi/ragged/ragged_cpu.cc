// ragged_transpose_quant on the host.

#include "cpu/columns.h"
#include "ragged/ragged.h"

namespace jax_tsq {

void RaggedOnCpu(const RaggedProblem& p, const Executor& executor, CpuLevel level) {
  cpu::QuantizeColumns(p.input, {p.group_sizes, p.groups, p.aligned},
                       {p.padded_tokens, p.flat, p.values, p.dequant_scales, p.padded_sizes}, executor, level);
}

}  // namespace jax_tsq
