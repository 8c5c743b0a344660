// ragged_weight_gradient: dW[e] = X_e^T dY_e, or dW[e] added to an accumulator, from transposed FP8 operands whose
// group sizes only the device knows.

#ifndef JAX_TSQ_WGRAD_WGRAD_H_
#define JAX_TSQ_WGRAD_WGRAD_H_

#include <cstdint>

#include "core/numerics.h"
#include "core/stream.h"

namespace jax_tsq {

struct WgradProblem {
  const uint8_t* x;            // [batch, x_features, tokens] float8_e4m3fn
  const float* x_scales;       // [batch, tokens / kBlock, x_features]
  const uint8_t* dy;           // [batch, dy_features, tokens] float8_e4m3fn
  const float* dy_scales;      // [batch, tokens / kBlock, dy_features]
  const int32_t* group_sizes;  // [batch, groups]; any values, see core/groups.h; whole blocks count
  // Null, or what float32 dW is added to: dw itself, or an array like it that is copied there first. Groups without
  // tokens leave it as it is.
  const void* accumulator;
  void* dw;  // [batch, groups, x_features, dy_features] bfloat16 or float32
  bool dw_is_bf16;
  int64_t batch;
  int64_t groups;
  int64_t x_features;
  int64_t dy_features;
  int64_t tokens;               // a multiple of kBlock
  int64_t multiprocessors = 0;  // that the kernel takes at most, 0 for all
};

// Enqueues the kernel, which needs compute capability 9.0. Returns null, or a message that lives forever.
const char* WgradOnCuda(const WgradProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_WGRAD_WGRAD_H_
