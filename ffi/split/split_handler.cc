// FFI handlers of fused_transpose_split_quant.

#include <cstdint>
#include <string>

#include "core/numerics.h"
#include "split/split.h"
#include "xla/buffers.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, [input_scales]; results all outs, then all scales. The experts' token counts are the outs' shapes.
ffi::ErrorOr<SplitProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales) {
  auto read = ReadInput(operands, 1, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (results.size() % 2 != 0) return ffi::Unexpected(Invalid("results must be as many outs as scales."));

  SplitProblem problem = {input, {}};
  const size_t experts = results.size() / 2;
  problem.experts.reserve(experts);
  int64_t first_token = 0;
  for (size_t i = 0; i < experts; ++i) {
    const ffi::AnyBuffer &out = results[i], &scales = results[experts + i];
    const auto dims = out.dimensions();
    const int64_t tokens = dims.size() == 0 ? -1 : dims[dims.size() - 1];
    if (tokens < 0 || tokens > input.tokens - first_token) {
      return ffi::Unexpected(Invalid("outs must have as many tokens together as x, " + std::to_string(input.tokens) +
                                     "; got more, or a negative number, at expert " + std::to_string(i) + "."));
    }
    const std::string index = "[" + std::to_string(i) + "]";
    const ffi::Error error =
        FirstOf({CheckBuffer("outs" + index, out, ffi::F8E4M3FN, batch, {input.features, tokens}),
                 CheckBuffer("scales" + index, scales, ffi::F32, batch, {CeilDiv(tokens, kBlock), input.features})});
    if (error.failure()) return ffi::Unexpected(error);
    problem.experts.push_back(
        {first_token, tokens, static_cast<uint8_t*>(out.untyped_data()), static_cast<float*>(scales.untyped_data())});
    first_token += tokens;
  }
  if (first_token != input.tokens) {
    return ffi::Unexpected(Invalid("outs must have as many tokens together as x, " + std::to_string(input.tokens) +
                                   "; got " + std::to_string(first_token) + "."));
  }
  return problem;
}

constexpr Handler kHandler("fused_transpose_split_quant", Decode, "pow_2_scales");

}  // namespace

extern "C" XLA_FFI_Error* SplitCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(SplitOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* SplitCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(SplitOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
