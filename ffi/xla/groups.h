// What operations read of group sizes that only the device knows.

#ifndef JAX_TSQ_XLA_GROUPS_H_
#define JAX_TSQ_XLA_GROUPS_H_

#include <cstdint>

#include "core/input.h"
#include "xla/buffers.h"

namespace jax_tsq {

struct GroupSizes {
  const int32_t* sizes;  // [batch, groups]
  int64_t groups;
};

ffi::ErrorOr<GroupSizes> ReadGroupSizes(const ffi::AnyBuffer& buffer, const Dims& batch);

// The tokens of a padded result, which has no more elements than any array.
ffi::ErrorOr<int64_t> CountPadded(const Input& input, int64_t groups, bool aligned);

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_GROUPS_H_
