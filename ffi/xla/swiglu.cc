#include "xla/swiglu.h"

#include <cstdint>

#include "core/numerics.h"
#include "xla/groups.h"

namespace jax_tsq {

ffi::ErrorOr<BatchedSwigluInput> ReadSwigluInput(const ffi::AnyBuffer& gate_up, const ffi::AnyBuffer& group_sizes,
                                                 const ffi::AnyBuffer* weights, bool pow_2_scales, float limit) {
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
  const auto sizes = ReadGroupSizes(group_sizes, batch);
  if (!sizes.has_value()) return ffi::Unexpected(sizes.error());
  const ffi::Error error = FirstOf({
      CheckSize("gate_up", gate_up),
      CheckBuffer("gate_up", gate_up, ffi::BF16, batch, {tokens, 2 * features}),
      weights == nullptr ? ffi::Error::Success() : CheckBuffer("weights", *weights, ffi::F32, batch, {tokens}),
      CheckAligned("gate_up", gate_up),
  });
  if (error.failure()) return ffi::Unexpected(error);
  SwigluInput input = {};
  input.gate_up = gate_up.untyped_data();
  input.weights = weights == nullptr ? nullptr : static_cast<const float*>(weights->untyped_data());
  input.group_sizes = sizes->sizes;
  input.batch = CountBatch(batch);
  input.tokens = tokens;
  input.features = features;
  input.groups = sizes->groups;
  input.pow_2_scales = pow_2_scales;
  input.limit = limit > 0.0f ? limit : kNoLimit;
  return BatchedSwigluInput{input, batch};
}

}  // namespace jax_tsq
