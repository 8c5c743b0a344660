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

// More than 2^31 elements in which the same 128 rows repeat, so that every token block has the same result.
struct LargeInput {
  explicit LargeInput(Arena& arena);
  LargeInput(const LargeInput&) = delete;
  LargeInput& operator=(const LargeInput&) = delete;

  std::vector<uint16_t> rows;
  Input block;  // those rows, on the host
  Input input;  // on the device
};

// Whether the result of every token block is `expected`: some of them are looked at. It is a matrix with rows of
// `width` elements, which lie `pitch` apart; the next block's lies `distance` further. Empty, or what is wrong.
std::string CompareRepeated(const void* got, size_t element, int64_t pitch, const void* expected, int64_t width,
                            int64_t height, int64_t distance);
template <class T>
std::string CompareRepeated(const T* got, int64_t pitch, const std::vector<T>& expected, int64_t width,
                            int64_t distance) {
  return CompareRepeated(got, sizeof(T), pitch, expected.data(), width, static_cast<int64_t>(expected.size()) / width,
                         distance);
}

// Quantizes a large input of one expert along columns: empty, or what is wrong.
std::string CheckLargeColumns(
    const std::function<const char*(const Input& input, uint8_t* out, float* dequant_scales, Arena& arena)>& launch);

struct InputSize {
  int64_t tokens, features, experts;
  InputType type = InputType::kBf16;
  int64_t batch = 1;

  std::string Name(const std::string& kind) const;
};

std::vector<InputSize> BenchSizes();
// Those of a layer whose products are in FP8.
std::vector<InputSize> LayerSizes();
// Uneven multiples of `multiple` that add up to the tokens, spread like those of the Python benchmarks.
std::vector<int32_t> SpreadTokens(int64_t tokens, int64_t experts, int64_t multiple);
Input MakeBenchInput(const InputSize& size, Arena& arena);
// Of x and its scales, where so many tokens of each batch are read.
double BytesRead(const InputSize& size, int64_t tokens);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_INPUT_CUDA_H_
