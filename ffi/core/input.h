// What every operation reads: a batch of token matrices. Plain types, shared by host and device code.

#ifndef JAX_TSQ_CORE_INPUT_H_
#define JAX_TSQ_CORE_INPUT_H_

#include <cstdint>

namespace jax_tsq {

enum class InputType { kBf16, kFp8 };

struct Input {
  InputType type;
  const void* x;              // [batch, tokens, features], row-major, of `type`
  const float* input_scales;  // [batch, tokens, CeilDiv(features, kBlock)] for kFp8, null for kBf16
  int64_t batch;
  int64_t tokens;
  int64_t features;
  bool pow_2_scales;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_INPUT_H_
