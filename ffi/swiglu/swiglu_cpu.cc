// swiglu_quantize on the host.

#include "cpu/rows.h"
#include "cpu/swiglu.h"
#include "swiglu/swiglu.h"

namespace jax_tsq {

void SwigluOnCpu(const SwigluProblem& p, const Executor& executor, CpuLevel level) {
  const SwigluInput& input = p.input;
  const auto forward = cpu::SwigluFor(level).forward;
  const auto source = [&](int64_t row, int64_t column, int features, void* scratch) -> const void* {
    const auto* gate = static_cast<const cpu::Bf16Bits*>(input.gate_up) + row * 2 * input.features + column;
    auto* h = static_cast<cpu::Bf16Bits*>(scratch);
    const float weight = input.weights == nullptr ? 1.0f : input.weights[row];
    for (int i = 0; i < features; i += kBlock) forward(gate + i, gate + input.features + i, weight, input.limit, h + i);
    return scratch;
  };
  const cpu::GroupSizes groups = {input.group_sizes, input.groups, false};
  const Input h = {InputType::kBf16, nullptr, nullptr, input.batch, input.tokens, input.features, input.pow_2_scales};
  cpu::QuantizeRows(h, source, &groups, {p.values, p.dequant_scales}, executor, level);
}

}  // namespace jax_tsq
