// FFI handlers of swiglu_quantize.

#include <cstdint>

#include "core/numerics.h"
#include "swiglu/swiglu.h"
#include "xla/buffers.h"
#include "xla/handler.h"
#include "xla/swiglu.h"

namespace jax_tsq {
namespace {

// Operands gate_up, group_sizes, [weights]; results values, scales, which lie as [blocks of features, tokens]. There is
// no limit where it is not positive.
ffi::ErrorOr<SwigluProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, float limit) {
  const bool has_weights = operands.size() == 3;
  if ((operands.size() != 2 && !has_weights) || results.size() != 2) {
    return ffi::Unexpected(
        Invalid("the operands must be gate_up, group_sizes and, maybe, weights, and the results values and scales."));
  }
  const auto read =
      ReadSwigluInput(operands[0], operands[1], has_weights ? &operands[2] : nullptr, pow_2_scales, limit);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const SwigluInput& input = read->input;
  const Dims& batch = read->batch;
  const ffi::Error error = FirstOf({
      CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.tokens, input.features}),
      CheckBuffer("scales", results[1], ffi::F32, batch, {input.tokens, input.features / kBlock}),
      CheckAligned("values", results[0]),
  });
  if (error.failure()) return ffi::Unexpected(error);
  return SwigluProblem{input, static_cast<uint8_t*>(results[0].untyped_data()),
                       static_cast<float*>(results[1].untyped_data())};
}

constexpr Handler kHandler("swiglu_quantize", Decode, "pow_2_scales", "limit");

}  // namespace

extern "C" XLA_FFI_Error* SwigluCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(SwigluOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* SwigluCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(SwigluOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
