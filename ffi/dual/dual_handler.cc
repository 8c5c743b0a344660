// FFI handlers of ragged_quantize.

#include <cstdint>

#include "core/numerics.h"
#include "dual/dual.h"
#include "xla/buffers.h"
#include "xla/groups.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, group_sizes; results row values, row scales, which lie as [blocks of features, tokens], column values,
// column scales, padded group sizes.
ffi::ErrorOr<DualProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, bool aligned) {
  auto read = ReadBf16Input(operands, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (operands.size() != 2) return ffi::Unexpected(Invalid("operands must be x and group_sizes."));
  if (results.size() != 5) {
    return ffi::Unexpected(Invalid("results must be values and scales of rows, those of columns, and group sizes."));
  }
  const auto groups = ReadGroupSizes(operands[1], batch);
  if (!groups.has_value()) return ffi::Unexpected(groups.error());
  const auto padded = CountPadded(input, groups->groups, aligned);
  if (!padded.has_value()) return ffi::Unexpected(padded.error());
  const ffi::Error error = FirstOf({
      CheckBuffer("row values", results[0], ffi::F8E4M3FN, batch, {input.tokens, input.features}),
      CheckBuffer("row scales", results[1], ffi::F32, batch, {input.tokens, CeilDiv(input.features, kBlock)}),
      CheckBuffer("column values", results[2], ffi::F8E4M3FN, batch, {input.features, *padded}),
      CheckBuffer("column scales", results[3], ffi::F32, batch, {*padded / kBlock, input.features}),
      CheckBuffer("padded group sizes", results[4], ffi::S32, batch, {groups->groups}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  DualProblem problem = {};
  problem.input = input;
  problem.group_sizes = groups->sizes;
  problem.groups = groups->groups;
  problem.padded_tokens = *padded;
  problem.aligned = aligned;
  problem.row_values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.row_dequant_scales = static_cast<float*>(results[1].untyped_data());
  problem.column_values = static_cast<uint8_t*>(results[2].untyped_data());
  problem.column_dequant_scales = static_cast<float*>(results[3].untyped_data());
  problem.padded_sizes = static_cast<int32_t*>(results[4].untyped_data());
  return problem;
}

constexpr Handler kHandler("ragged_quantize", Decode, "pow_2_scales", "aligned");

}  // namespace

extern "C" XLA_FFI_Error* DualCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(DualOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* DualCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(DualOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
