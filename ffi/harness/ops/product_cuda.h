// What products share on a GPU: sizes of benchmarks, and their error.

#ifndef JAX_TSQ_HARNESS_OPS_PRODUCT_CUDA_H_
#define JAX_TSQ_HARNESS_OPS_PRODUCT_CUDA_H_

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "harness/benchmark.h"
#include "harness/ops/input_cuda.h"

namespace jax_tsq::harness {

struct ProductSize {
  int64_t tokens, x_features, dy_features, groups;

  std::string Name() const;
};

std::vector<ProductSize> ProductSizes();

// One element of a product, whose operands lie in device memory: sum over i < count of a[i] * b[i], times the scales of
// each block of 128.
struct Element {
  struct Scales {
    const float* first;
    int64_t stride;
  };
  const uint8_t* a;
  Scales a_scales;
  const uint8_t* b;
  Scales b_scales;
  int64_t count;
  const void* result;
  bool is_bf16;
};

// The error of random elements against sums in double precision, relative to their size.
double RelativeError(const std::function<Element(std::mt19937&)>& element);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_PRODUCT_CUDA_H_
