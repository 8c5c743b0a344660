// What products of FP8 operands share: contents, and the comparison with sums in double precision.

#ifndef JAX_TSQ_HARNESS_OPS_PRODUCT_H_
#define JAX_TSQ_HARNESS_OPS_PRODUCT_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "harness/memory.h"

namespace jax_tsq::harness {

using Sizes = std::vector<int32_t>;

enum class Numbers {
  kNormal,
  kWildScales,  // some are zero, subnormal, huge, infinite or NaN
  kExact,       // small integers with scales that are powers of two: no sum has to be rounded
};

void FillFp8Operand(Numbers numbers, std::mt19937& random, int64_t count, uint8_t* values);
// `position` among scales that belong together: infinities and NaN are at few of them, so that there are other results.
float RandomScale(Numbers numbers, std::mt19937& random, int64_t position);

// One element of a product.
struct ProductSum {
  // Adds a block: the scale, times the sum over i < count of a[i] * b[i].
  void Add(const uint8_t* a, const uint8_t* b, int64_t count, float scale);

  double value = 0.0;
  double bound = 0.0;  // of the error, for float32
  bool may_overflow = false;
};

// Empty, or what is wrong with a result of bfloat16 or float32.
std::string CompareProduct(Numbers numbers, bool bf16, const std::vector<ProductSum>& sums, const Array& result);

// What a product is added to: numbers of its size, zeros of both signs, and some that are subnormal or not finite.
float RandomTerm(std::mt19937& random);

// Empty, or which of `sums` is not term + product by one float32 addition, or the very term where nothing is added.
std::string CompareAdded(const std::vector<bool>& is_added, const Array& terms, const Array& products,
                         const Array& sums);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_PRODUCT_H_
