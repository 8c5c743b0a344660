// quantize_rows on the host.

#include "cpu/rows.h"
#include "rows/rows.h"

namespace jax_tsq {

void RowsOnCpu(const RowsProblem& p, const Executor& executor, CpuLevel level) {
  const cpu::GroupSizes groups = {p.group_sizes, p.groups, p.aligned};
  cpu::QuantizeRows(p.input, p.group_sizes == nullptr ? nullptr : &groups, {p.values, p.dequant_scales}, executor,
                    level);
}

}  // namespace jax_tsq
