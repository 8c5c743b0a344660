// FFI handlers of quantize_blocks.

#include <cstdint>
#include <string>

#include "blocks/blocks.h"
#include "core/limits.h"
#include "core/numerics.h"
#include "xla/buffers.h"
#include "xla/handler.h"

namespace jax_tsq {
namespace {

// Operands: weights, one array or several that are joined along their last dimension; results values, the same
// transposed, scales.
ffi::ErrorOr<BlocksProblem> Decode(const Buffers& operands, const Buffers& results, bool pow_2_scales) {
  if (operands.empty() || operands.size() > kMostParts) {
    return ffi::Unexpected(Invalid("operands must be one to " + std::to_string(kMostParts) + " arrays of weights."));
  }
  if (results.size() != 3) return ffi::Unexpected(Invalid("results must be values, transposed values and scales."));
  const ffi::AnyBuffer& first = operands[0];
  const ffi::DataType type = first.element_type();
  if (type != ffi::F32 && type != ffi::BF16) {
    return ffi::Unexpected(Invalid("w must be F32 or BF16; got " + ToString(first) + "."));
  }
  if (first.dimensions().size() < 3) return ffi::Unexpected(Invalid("w must have at least three dimensions."));
  Dims experts = DimsOf(first);
  experts.pop_back();
  const int64_t rows = experts.back();
  experts.pop_back();

  BlocksProblem problem = {};
  problem.type = type == ffi::F32 ? WeightType::kFloat32 : WeightType::kBf16;
  for (const ffi::AnyBuffer& part : operands) {
    const auto dims = part.dimensions();
    const int64_t columns = dims.size() == 0 ? -1 : dims[dims.size() - 1];
    const ffi::Error error = FirstOf({CheckSize("w", part), CheckBuffer("w", part, type, experts, {rows, columns})});
    if (error.failure()) return ffi::Unexpected(error);
    if (columns > kMostElements - problem.columns) return ffi::Unexpected(Invalid("w has too many columns."));
    problem.parts[problem.num_parts++] = {part.untyped_data(), columns};
    problem.columns += columns;
  }
  const ffi::Error error = FirstOf({
      CheckSize("values", results[0]),
      CheckBuffer("values", results[0], ffi::F8E4M3FN, experts, {rows, problem.columns}),
      CheckBuffer("transposed values", results[1], ffi::F8E4M3FN, experts, {problem.columns, rows}),
      CheckBuffer("scales", results[2], ffi::F32, experts, {CeilDiv(rows, kBlock), CeilDiv(problem.columns, kBlock)}),
  });
  if (error.failure()) return ffi::Unexpected(error);
  problem.experts = CountBatch(experts);
  problem.rows = rows;
  problem.pow_2_scales = pow_2_scales;
  problem.values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.transposed = static_cast<uint8_t*>(results[1].untyped_data());
  problem.dequant_scales = static_cast<float*>(results[2].untyped_data());
  return problem;
}

constexpr Handler kHandler("quantize_blocks", Decode, "pow_2_scales");

}  // namespace

extern "C" XLA_FFI_Error* BlocksCpu(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cpu(BlocksOnCpu);
  return handler->Call(call);
}

#ifdef JAX_TSQ_CUDA
extern "C" XLA_FFI_Error* BlocksCuda(XLA_FFI_CallFrame* call) {
  static ffi::Ffi* const handler = kHandler.Cuda(BlocksOnCuda);
  return handler->Call(call);
}
#endif

}  // namespace jax_tsq
