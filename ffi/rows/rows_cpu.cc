// quantize_rows on the host.

#include "cpu/rows.h"
#include "rows/rows.h"

namespace jax_tsq {

void RowsOnCpu(const RowsProblem& p, const Executor& executor, CpuLevel level) {
  cpu::QuantizeRows(p.input, {p.group_sizes, p.groups, p.aligned}, {p.values, p.dequant_scales}, executor, level);
}

}  // namespace jax_tsq
