// What operations that quantize x share: its cases, memory and calls.

#ifndef JAX_TSQ_HARNESS_OPS_INPUT_H_
#define JAX_TSQ_HARNESS_OPS_INPUT_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/input.h"
#include "harness/data.h"
#include "harness/memory.h"

#ifdef JAX_TSQ_HANDLERS
#include "harness/calls.h"
#endif

namespace jax_tsq::harness {

struct InputCase {
  std::string name;
  InputType type = InputType::kBf16;
  bool pow_2_scales = false;
  Data data = Data::kEdge;
  int64_t batch = 1;
  int64_t tokens = 0;
  int64_t features = 0;
  // Distance in elements from the alignment of an allocation
  int x_offset = 0;
  int out_offset = 0;
  int scales_offset = 0;
  unsigned seed = 1;
  int64_t first_column = 0;  // of kPairs
  bool along_rows = false;   // data as others have it along columns

  size_t ElementBytes() const { return type == InputType::kBf16 ? 2 : 1; }
};

// Each input type, either rounding, aligned and off by one: calls add(case) with each.
template <class Case, class Add>
void ForEachVariant(Case c, const Add& add,
                    std::initializer_list<InputType> types = {InputType::kBf16, InputType::kFp8}) {
  for (const InputType type : types) {
    for (const bool pow_2_scales : {false, true}) {
      for (const int offset : {0, 1}) {
        c.type = type;
        c.pow_2_scales = pow_2_scales;
        c.x_offset = c.out_offset = c.scales_offset = offset;
        add(c);
      }
    }
  }
}

int64_t Uniform(std::mt19937& random, int64_t low, int64_t high);
// Everything except batch and tokens.
void MakeRandom(std::mt19937& random, InputCase& c);
// Tokens of some experts: small ones, many of them empty or a multiple of something.
std::vector<int64_t> RandomCounts(std::mt19937& random);
int64_t Sum(const std::vector<int64_t>& counts);

std::string Describe(const InputCase& c);
// All numbers if they are few.
template <class T>
std::string Describe(const std::vector<T>& numbers) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(numbers.size(), 64); ++i) text += " " + std::to_string(numbers[i]);
  return text;
}

// The first arrays of a problem. Input scales are empty for bf16.
enum InputArray { kX, kInputScales, kInputArrays };
// Adds them. Of each batch, only the first `rows` rows may be read.
void AddInputArrays(const InputCase& c, const std::vector<int64_t>& rows, Memory& memory);
Input MakeInput(const InputCase& c, const Addresses& addresses);

#ifdef JAX_TSQ_HANDLERS
// What decides the shapes of x and its scales.
struct InputShape {
  bool fp8 = false;
  Dims batch;
  int64_t tokens = 0;
  int64_t features = 0;
};

// Small sizes for x, of which `counts` are tokens of experts.
InputShape MakeInputShape(Bytes& bytes, std::vector<int64_t>& counts);
// Huge and empty ones, now and then; true if it made them.
bool MakeHugeInput(Bytes& bytes, InputShape& shape);
// Adds x, what comes between, and the scales if there are any.
void AddInput(const InputShape& shape, std::vector<FrameBuffer> between, std::vector<FrameBuffer>& operands);
InputShape InputShapeOf(const Frame& frame);
Input InputOf(const Frame& frame, bool pow_2_scales);
#endif

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_INPUT_H_
