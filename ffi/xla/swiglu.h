// What SwiGLU and its gradient read of XLA's buffers.

#ifndef JAX_TSQ_XLA_SWIGLU_H_
#define JAX_TSQ_XLA_SWIGLU_H_

#include "core/swiglu.h"
#include "xla/buffers.h"

namespace jax_tsq {

struct BatchedSwigluInput {
  SwigluInput input;
  Dims batch;
};

// `weights` may be null.
ffi::ErrorOr<BatchedSwigluInput> ReadSwigluInput(const ffi::AnyBuffer& gate_up, const ffi::AnyBuffer& group_sizes,
                                                 const ffi::AnyBuffer* weights, bool pow_2_scales, float limit);

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_SWIGLU_H_
