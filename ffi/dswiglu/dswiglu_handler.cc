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

// Operands gate_up, dh, weights, group_sizes; results of do1 row values, row scales, which lie as [blocks of features,
// tokens], column values and column scales, of h column values and column scales; padded group sizes; the gradient of
// the weights, and a workspace for it, which have no tokens where the weights have none. There is no limit where it is
// not positive.
ffi::ErrorOr<DswigluProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales, bool aligned,
                                    float limit) {
  if (operands.size() != 4 || results.size() != 9) {
    return ffi::Unexpected(
        Invalid("the operands must be gate_up, dh, weights and group_sizes, and the results values and scales of rows "
                "and of columns, those of columns of h, group sizes, and the weights' gradient with a workspace."));
  }
  const auto read = ReadSwigluInput(operands, pow_2_scales, limit);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch, weighted] = *read;
  const int64_t tokens = input.tokens, features = input.features, both = 2 * features;
  const Input do1 = {InputType::kBf16, nullptr, nullptr, input.batch, tokens, both, pow_2_scales};
  const auto padded = CountPadded(do1, input.groups, aligned);
  if (!padded.has_value()) return ffi::Unexpected(padded.error());
  const ffi::Error error = FirstOf({
      CheckBuffer("dh", operands[1], ffi::BF16, batch, {tokens, features}),
      CheckBuffer("row values", results[0], ffi::F8E4M3FN, batch, {tokens, both}),
      CheckBuffer("row scales", results[1], ffi::F32, batch, {tokens, both / kBlock}),
      CheckBuffer("column values", results[2], ffi::F8E4M3FN, batch, {both, *padded}),
      CheckBuffer("column scales", results[3], ffi::F32, batch, {*padded / kBlock, both}),
      CheckBuffer("column values of h", results[4], ffi::F8E4M3FN, batch, {features, *padded}),
      CheckBuffer("column scales of h", results[5], ffi::F32, batch, {*padded / kBlock, features}),
      CheckBuffer("padded group sizes", results[6], ffi::S32, batch, {input.groups}),
      CheckBuffer("the weights' gradient", results[7], ffi::F32, batch, {weighted}),
      CheckBuffer("the workspace", results[8], ffi::F32, batch, {features / kBlock, weighted}),
      CheckAligned("dh", operands[1]),
      CheckAligned("row values", results[0]),
      CheckAligned("column values", results[2]),
      CheckAligned("column values of h", results[4]),
  });
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
  problem.dweights = static_cast<float*>(results[7].untyped_data());
  problem.block_sums = static_cast<float*>(results[8].untyped_data());
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
