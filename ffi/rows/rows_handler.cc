// FFI handlers of quantize_rows.

#include <cstdint>

#include "core/numerics.h"
#include "rows/rows.h"
#include "xla/buffers.h"
#include "xla/groups.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, [group_sizes]; results values, scales, which lie as [blocks of features, tokens].
ffi::ErrorOr<RowsProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, bool aligned) {
  auto read = ReadBf16Input(operands, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (operands.size() > 2) return ffi::Unexpected(Invalid("operands must be x and, maybe, group_sizes."));
  if (results.size() != 2) return ffi::Unexpected(Invalid("results must be values and scales."));

  RowsProblem problem = {};
  problem.input = input;
  problem.aligned = aligned;
  if (operands.size() == 2) {
    const auto groups = ReadGroupSizes(operands[1], batch);
    if (!groups.has_value()) return ffi::Unexpected(groups.error());
    problem.group_sizes = groups->sizes;
    problem.groups = groups->groups;
  }
  const ffi::Error error = FirstOf({
      CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.tokens, input.features}),
      CheckBuffer("scales", results[1], ffi::F32, batch, {input.tokens, CeilDiv(input.features, kBlock)}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  problem.values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.dequant_scales = static_cast<float*>(results[1].untyped_data());
  return problem;
}

constexpr Handler kHandler("quantize_rows", Decode, "pow_2_scales", "aligned");

}  // namespace

extern "C" XLA_FFI_Error* RowsCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(RowsOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* RowsCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(RowsOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
