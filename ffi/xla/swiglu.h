// What SwiGLU and its gradient read of XLA's buffers.

#ifndef JAX_TSQ_XLA_SWIGLU_H_
#define JAX_TSQ_XLA_SWIGLU_H_

#include <cstdint>

#include "core/numerics.h"
#include "core/swiglu.h"
#include "xla/buffers.h"
#include "xla/groups.h"

namespace jax_tsq {

struct BatchedSwigluInput {
  SwigluInput input;
  Dims batch;
  int64_t weighted_tokens;  // all, or 0 where there are no weights
};

// Reads gate_up, and weights and group_sizes, which are the last two operands. Weights without tokens are none.
inline ffi::ErrorOr<BatchedSwigluInput> ReadSwigluInput(const Buffers& operands, bool pow_2_scales, float limit) {
  const ffi::AnyBuffer &gate_up = operands[0], &weights = operands[operands.size() - 2];
  Dims batch = DimsOf(gate_up);
  if (batch.size() < 2) return ffi::Unexpected(Invalid("gate_up must have at least two dimensions."));
  const int64_t features = batch.back() / 2;
  batch.pop_back();
  const int64_t tokens = batch.back();
  batch.pop_back();
  if (features % kBlock != 0) {
    return ffi::Unexpected(
        Invalid("gate_up must have two times as many features as a multiple of 128; got " + ToString(gate_up) + "."));
  }
  const auto weights_dims = weights.dimensions();
  const bool has_weights = !(weights_dims.size() == batch.size() + 1 && weights_dims[batch.size()] == 0);
  const int64_t weighted_tokens = has_weights ? tokens : 0;
  const auto sizes = ReadGroupSizes(operands.back(), batch);
  if (!sizes.has_value()) return ffi::Unexpected(sizes.error());
  const ffi::Error error = FirstOf({
      CheckSize("gate_up", gate_up),
      CheckBuffer("gate_up", gate_up, ffi::BF16, batch, {tokens, 2 * features}),
      CheckBuffer("weights", weights, ffi::F32, batch, {weighted_tokens}),
      CheckAligned("gate_up", gate_up),
  });
  if (error.failure()) return ffi::Unexpected(error);
  SwigluInput input = {};
  input.gate_up = gate_up.untyped_data();
  input.weights = has_weights ? static_cast<const float*>(weights.untyped_data()) : nullptr;
  input.group_sizes = sizes->sizes;
  input.batch = CountBatch(batch);
  input.tokens = tokens;
  input.features = features;
  input.groups = sizes->groups;
  input.pow_2_scales = pow_2_scales;
  input.limit = limit > 0.0f ? limit : kNoLimit;
  return BatchedSwigluInput{input, batch, weighted_tokens};
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_SWIGLU_H_
