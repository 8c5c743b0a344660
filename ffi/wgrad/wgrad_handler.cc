// FFI handlers of ragged_weight_gradient, which has a kernel for CUDA only.

#include <algorithm>
#include <cstdint>

#include "core/limits.h"
#include "core/numerics.h"
#include "wgrad/wgrad.h"
#include "xla/buffers.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, its scales, dy, its scales, group_sizes and, if dW is added to one, an accumulator, of which XLA makes
// the result where it can; the result dW.
ffi::ErrorOr<WgradProblem> Decode(const Buffers& operands, const Buffers& results, int64_t multiprocessors) {
  const bool accumulate = operands.size() == 6;
  if ((operands.size() != 5 && !accumulate) || results.size() != 1) {
    return ffi::Unexpected(Invalid(
        "the operands must be x, its scales, dy, its scales, group_sizes and optionally an accumulator, and the "
        "result dW."));
  }
  const ffi::AnyBuffer &x = operands[0], &dy = operands[2], &sizes = operands[4], &dw = results[0];
  if (x.dimensions().size() < 2 || dy.dimensions().size() < 2 || sizes.dimensions().size() < 1) {
    return ffi::Unexpected(Invalid("x and dy must have at least two dimensions, and group_sizes one."));
  }
  Dims batch = DimsOf(x);
  const int64_t tokens = batch.back();
  batch.pop_back();
  const int64_t x_features = batch.back();
  batch.pop_back();
  const int64_t dy_features = dy.dimensions()[dy.dimensions().size() - 2];
  const int64_t groups = sizes.dimensions()[sizes.dimensions().size() - 1];
  const bool bf16 = dw.element_type() == ffi::BF16;
  if (tokens < 0 || tokens > kMostTokens || std::max(x_features, dy_features) > kMostProductFeatures) {
    return ffi::Unexpected(Invalid("x or dy is too large."));
  }
  const ffi::Error error = FirstOf({
      CheckMultiprocessors(multiprocessors),
      CheckSize("x", x),
      CheckSize("dy", dy),
      CheckSize("dW", dw),
      CheckBuffer("x", x, ffi::F8E4M3FN, batch, {x_features, tokens}),
      CheckBuffer("x's scales", operands[1], ffi::F32, batch, {tokens / kBlock, x_features}),
      CheckBuffer("dy", dy, ffi::F8E4M3FN, batch, {dy_features, tokens}),
      CheckBuffer("dy's scales", operands[3], ffi::F32, batch, {tokens / kBlock, dy_features}),
      CheckBuffer("group_sizes", sizes, ffi::S32, batch, {groups}),
      CheckBuffer("dW", dw, bf16 && !accumulate ? ffi::BF16 : ffi::F32, batch, {groups, x_features, dy_features}),
      CheckBuffer("the accumulator", accumulate ? operands[5] : dw, dw.element_type(), batch,
                  {groups, x_features, dy_features}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  // What the kernel's copies ask for
  if (tokens % kBlock != 0 || x_features % 4 != 0 || dy_features % (bf16 ? 8 : 4) != 0 || groups > kMostProductGroups) {
    return ffi::Unexpected(
        Invalid("the kernel needs tokens that are a multiple of 128, features of x that are a multiple of 4, "
                "features of dy that are one of 4 (of 8 for BF16 dW), and at most 1024 groups; got x " +
                ToString(x) + ", dy " + ToString(dy) + ", dW " + ToString(dw) + "."));
  }
  const ffi::Error alignment =
      FirstOf({CheckAligned("x", x), CheckAligned("x's scales", operands[1]), CheckAligned("dy", dy),
               CheckAligned("dy's scales", operands[3]), CheckAligned("dW", dw)});
  if (alignment.failure()) return ffi::Unexpected(alignment);
  WgradProblem problem = {};
  problem.x = static_cast<const uint8_t*>(x.untyped_data());
  problem.x_scales = static_cast<const float*>(operands[1].untyped_data());
  problem.dy = static_cast<const uint8_t*>(dy.untyped_data());
  problem.dy_scales = static_cast<const float*>(operands[3].untyped_data());
  problem.group_sizes = static_cast<const int32_t*>(sizes.untyped_data());
  problem.accumulator = accumulate ? operands[5].untyped_data() : nullptr;
  problem.dw = dw.untyped_data();
  problem.dw_is_bf16 = bf16;
  problem.batch = CountBatch(batch);
  problem.groups = groups;
  problem.x_features = x_features;
  problem.dy_features = dy_features;
  problem.tokens = tokens;
  problem.multiprocessors = multiprocessors;
  return problem;
}

constexpr Handler kHandler("ragged_weight_gradient", Decode, "multiprocessors");

}  // namespace

extern "C" XLA_FFI_Error* WgradCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(WgradOnCuda);
  return handler->Call(call);
}

}  // namespace jax_tsq
