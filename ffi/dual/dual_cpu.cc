// ragged_quantize on the host: rows, then columns. x is read twice, which costs little where conversion takes the time.

#include "cpu/columns.h"
#include "cpu/rows.h"
#include "dual/dual.h"

namespace jax_tsq {

void DualOnCpu(const DualProblem& p, const Executor& executor, CpuLevel level) {
  const cpu::GroupSizes groups = {p.group_sizes, p.groups, p.aligned};
  cpu::QuantizeRows(p.input, &groups, {p.row_values, p.row_dequant_scales}, executor, level);
  cpu::QuantizeColumns(p.input, groups,
                       {p.padded_tokens, false, p.column_values, p.column_dequant_scales, p.padded_sizes}, executor,
                       level);
}

}  // namespace jax_tsq
