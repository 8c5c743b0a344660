// FFI handlers of ragged_transpose_quant.

#include <cstdint>

#include "core/numerics.h"
#include "ragged/ragged.h"
#include "xla/buffers.h"
#include "xla/groups.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, group_sizes, [input_scales]; results values, scales, padded group sizes.
ffi::ErrorOr<RaggedProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, bool aligned,
                                   bool flat) {
  auto read = ReadInput(operands, 2, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (results.size() != 3) return ffi::Unexpected(Invalid("results must be values, scales and group sizes."));

  const auto groups = ReadGroupSizes(operands[1], batch);
  if (!groups.has_value()) return ffi::Unexpected(groups.error());
  const auto counted = CountPadded(input, groups->groups, aligned);
  if (!counted.has_value()) return ffi::Unexpected(counted.error());
  const int64_t padded = *counted;
  const ffi::Error error = FirstOf({
      flat ? CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.features * padded})
           : CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.features, padded}),
      CheckBuffer("scales", results[1], ffi::F32, batch, {padded / kBlock, input.features}),
      CheckBuffer("padded group sizes", results[2], ffi::S32, batch, {groups->groups}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  RaggedProblem problem = {};
  problem.input = input;
  problem.group_sizes = groups->sizes;
  problem.groups = groups->groups;
  problem.padded_tokens = padded;
  problem.aligned = aligned;
  problem.flat = flat;
  problem.values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.dequant_scales = static_cast<float*>(results[1].untyped_data());
  problem.padded_sizes = static_cast<int32_t*>(results[2].untyped_data());
  return problem;
}

constexpr Handler kHandler("ragged_transpose_quant", Decode, "pow_2_scales", "aligned", "flat");

}  // namespace

extern "C" XLA_FFI_Error* RaggedCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(RaggedOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* RaggedCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(RaggedOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
