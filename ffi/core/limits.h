// The largest sizes that operations take. Handlers check them, before any arithmetic that they keep within 64 bits.

#ifndef JAX_TSQ_CORE_LIMITS_H_
#define JAX_TSQ_CORE_LIMITS_H_

#include <cstdint>

#include "core/numerics.h"

namespace jax_tsq {

// No array has more elements, nor an empty one a larger dimension: sums and products of a few sizes stay in 64 bits.
inline constexpr int64_t kMostElements = int64_t{1} << 60;
// Tokens of a padded result: whole blocks that 32 bits count.
inline constexpr int64_t kMostTokens = (int64_t{1} << 31) - kBlock;
// Features of a product on the tensor cores, whose last tile may stick out.
inline constexpr int64_t kMostProductFeatures = (int64_t{1} << 31) - 256;
// Groups of a product on the tensor cores: where they begin is a table in shared memory.
inline constexpr int64_t kMostProductGroups = 1024;

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_LIMITS_H_
