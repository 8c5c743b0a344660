// FFI handlers of swiglu_backward_quantize.

#include <cstdint>

#include "core/numerics.h"
#include "dswiglu/dswiglu.h"
#include "xla/buffers.h"
#include "xla/groups.h"
#include "xla/handler.h"
#include "xla/swiglu.h"

namespace jax_tsq {
namespace {

// Operands gate_up, dh, group_sizes, [weights]; results of do1 row values, row scales, which lie as [blocks of
// features, tokens], column values and column scales, of h column values and column scales; padded group sizes; with
// weights their gradient and a workspace for it. There is no limit where it is not positive.
ffi::ErrorOr<DswigluProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, bool aligned,
                                    float limit) {
  const bool has_weights = operands.size() == 4;
  if ((operands.size() != 3 && !has_weights) || results.size() != (has_weights ? 9 : 7)) {
    return ffi::Unexpected(
        Invalid("the operands must be gate_up, dh, group_sizes and, maybe, weights, and the results values and scales "
                "of rows and of columns, those of columns of h, group sizes, and with weights their gradient with a "
                "workspace."));
  }
  const auto read =
      ReadSwigluInput(operands[0], operands[2], has_weights ? &operands[3] : nullptr, pow_2_scales, limit);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  const int64_t tokens = input.tokens, features = input.features, both = 2 * features;
  const Input do1 = {InputType::kBf16, nullptr, nullptr, input.batch, tokens, both, pow_2_scales};
  const auto padded = CountPadded(do1, input.groups, aligned);
  if (!padded.has_value()) return ffi::Unexpected(padded.error());
  ffi::Error error = FirstOf({
      CheckBuffer("dh", operands[1], ffi::BF16, batch, {tokens, features}),
      CheckBuffer("row values", results[0], ffi::F8E4M3FN, batch, {tokens, both}),
      CheckBuffer("row scales", results[1], ffi::F32, batch, {tokens, both / kBlock}),
      CheckBuffer("column values", results[2], ffi::F8E4M3FN, batch, {both, *padded}),
      CheckBuffer("column scales", results[3], ffi::F32, batch, {*padded / kBlock, both}),
      CheckBuffer("column values of h", results[4], ffi::F8E4M3FN, batch, {features, *padded}),
      CheckBuffer("column scales of h", results[5], ffi::F32, batch, {*padded / kBlock, features}),
      CheckBuffer("padded group sizes", results[6], ffi::S32, batch, {input.groups}),
      CheckAligned("dh", operands[1]),
      CheckAligned("row values", results[0]),
      CheckAligned("column values", results[2]),
      CheckAligned("column values of h", results[4]),
  });
  if (error.success() && has_weights) {
    error = FirstOf({
        CheckBuffer("the weights' gradient", results[7], ffi::F32, batch, {tokens}),
        CheckBuffer("the workspace", results[8], ffi::F32, batch, {features / kBlock, tokens}),
    });
  }
  if (error.failure()) return ffi::Unexpected(error);
  DswigluProblem problem = {};
  problem.input = input;
  problem.dh = operands[1].untyped_data();
  problem.padded_tokens = *padded;
  problem.aligned = aligned;
  problem.row_values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.row_dequant_scales = static_cast<float*>(results[1].untyped_data());
  problem.column_values = static_cast<uint8_t*>(results[2].untyped_data());
  problem.column_dequant_scales = static_cast<float*>(results[3].untyped_data());
  problem.h_values = static_cast<uint8_t*>(results[4].untyped_data());
  problem.h_dequant_scales = static_cast<float*>(results[5].untyped_data());
  problem.padded_sizes = static_cast<int32_t*>(results[6].untyped_data());
  if (has_weights) {
    problem.dweights = static_cast<float*>(results[7].untyped_data());
    problem.block_sums = static_cast<float*>(results[8].untyped_data());
  }
  return problem;
}

constexpr Handler kHandler("swiglu_backward_quantize", Decode, "pow_2_scales", "aligned", "limit");

}  // namespace

extern "C" XLA_FFI_Error* DswigluCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(DswigluOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* DswigluCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(DswigluOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
