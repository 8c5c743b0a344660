// FFI handlers of ragged_matmul, which has a kernel for CUDA only.

#include <algorithm>
#include <cstdint>

#include "core/limits.h"
#include "core/numerics.h"
#include "matmul/matmul.h"
#include "xla/buffers.h"
#include "xla/groups.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands x, its scales, w as [groups, columns, features], its scales, group_sizes; the result y. XLA lays the scales
// of x out in column-major order. With transpose_w, w is what it is before it is transposed, and its last dimension is
// summed over all the same: only its scales lie the other way round.
ffi::ErrorOr<MatmulProblem> Decode(const Buffers& operands, const Buffers& results, bool transpose_w,
                                   int64_t multiprocessors) {
  if (operands.size() != 5 || results.size() != 1) {
    return ffi::Unexpected(
        Invalid("the operands must be x, its scales, w, its scales and group_sizes, and the result y."));
  }
  const ffi::AnyBuffer &x = operands[0], &w = operands[2], &y = results[0];
  if (x.dimensions().size() < 2 || w.dimensions().size() < 3) {
    return ffi::Unexpected(Invalid("x must have at least two dimensions, and w three."));
  }
  Dims batch = DimsOf(x);
  const int64_t features = batch.back();
  batch.pop_back();
  const int64_t tokens = batch.back();
  batch.pop_back();
  const int64_t columns = w.dimensions()[w.dimensions().size() - 2];
  if (tokens > kMostTokens || std::max(features, columns) > kMostProductFeatures) {
    return ffi::Unexpected(Invalid("x or w is too large."));
  }
  const auto sizes = ReadGroupSizes(operands[4], batch);
  if (!sizes.has_value()) return ffi::Unexpected(sizes.error());
  const int64_t groups = sizes->groups;
  const int64_t blocks = CeilDiv(features, kBlock), column_blocks = CeilDiv(columns, kBlock);
  const ffi::Error error = FirstOf({
      CheckMultiprocessors(multiprocessors),
      CheckSize("x", x),
      CheckSize("w", w),
      CheckSize("y", y),
      CheckBuffer("x", x, ffi::F8E4M3FN, batch, {tokens, features}),
      CheckBuffer("x's scales", operands[1], ffi::F32, batch, {tokens, blocks}),
      CheckBuffer("w", w, ffi::F8E4M3FN, batch, {groups, columns, features}),
      CheckBuffer("w's scales", operands[3], ffi::F32, batch,
                  {groups, transpose_w ? column_blocks : blocks, transpose_w ? blocks : column_blocks}),
      CheckBuffer("y", y, ffi::BF16, batch, {tokens, columns}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  // What the kernel's copies ask for
  if (features % 16 != 0 || columns % 8 != 0 || groups > kMostProductGroups) {
    return ffi::Unexpected(
        Invalid("the kernel needs features of x that are a multiple of 16, features of y that are one of 8, and at "
                "most 1024 groups; got x " +
                ToString(x) + ", w " + ToString(w) + ", y " + ToString(y) + "."));
  }
  const ffi::Error alignment = FirstOf({CheckAligned("x", x), CheckAligned("w", w), CheckAligned("y", y)});
  if (alignment.failure()) return ffi::Unexpected(alignment);
  MatmulProblem problem = {};
  problem.x = static_cast<const uint8_t*>(x.untyped_data());
  problem.x_scales = static_cast<const float*>(operands[1].untyped_data());
  problem.w = static_cast<const uint8_t*>(w.untyped_data());
  problem.w_scales = static_cast<const float*>(operands[3].untyped_data());
  problem.group_sizes = sizes->sizes;
  problem.y = y.untyped_data();
  problem.w_scales_by_column = transpose_w;
  problem.batch = CountBatch(batch);
  problem.groups = groups;
  problem.tokens = tokens;
  problem.features = features;
  problem.columns = columns;
  problem.multiprocessors = multiprocessors;
  return problem;
}

constexpr Handler kHandler("ragged_matmul", Decode, "transpose_w", "multiprocessors");

}  // namespace

extern "C" XLA_FFI_Error* MatmulCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(MatmulOnCuda);
  return handler->Call(call);
}

}  // namespace jax_tsq
