// What operations that quantize x share on a GPU: large problems and benchmarks.

#ifndef JAX_TSQ_HARNESS_OPS_INPUT_CUDA_H_
#define JAX_TSQ_HARNESS_OPS_INPUT_CUDA_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/input.h"
#include "harness/benchmark.h"

namespace jax_tsq::harness {

// Quantizes more than 2^31 elements of one expert along columns: empty, or what is wrong.
std::string CheckLargeInput(
    const std::function<const char*(const Input& input, uint8_t* out, float* dequant_scales, Arena& arena)>& launch);

struct InputSize {
  int64_t tokens, features, experts;
  InputType type = InputType::kBf16;
  int64_t batch = 1;

  std::string Name(const std::string& kind) const;
};

std::vector<InputSize> BenchSizes();
// Uneven multiples of `multiple` that add up to the tokens, spread like those of the Python benchmarks.
std::vector<int32_t> SpreadTokens(int64_t tokens, int64_t experts, int64_t multiple);
Input MakeBenchInput(const InputSize& size, Arena& arena);
// Of x and its scales, where so many tokens of each batch are read.
double BytesRead(const InputSize& size, int64_t tokens);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_INPUT_CUDA_H_
