// What SwiGLU and its gradient share: their cases, oracle and calls.

#ifndef JAX_TSQ_HARNESS_OPS_SWIGLU_INPUT_H_
#define JAX_TSQ_HARNESS_OPS_SWIGLU_INPUT_H_

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/swiglu.h"
#include "harness/memory.h"
#include "harness/ops/groups.h"

#ifdef JAX_TSQ_CUDA
#include "harness/benchmark.h"
#include "harness/ops/input_cuda.h"
#endif

namespace jax_tsq::harness {

// Features are those of h.
struct SwigluCase : GroupCase {
  bool weighted = true;
  float limit = kNoLimit;
};

std::string Describe(const SwigluCase& c);
std::vector<SwigluCase> NamedSwigluCases();
SwigluCase RandomSwigluCase(std::mt19937& random);
std::vector<SwigluCase> ReplayedSwigluCases();

// The first arrays of a problem.
enum SwigluArray { kGateUp, kWeights, kGroupSizes, kSwigluArrays };
void AddSwigluArrays(const SwigluCase& c, Memory& memory);
// Adds a bf16 matrix of as many rows, of which those in groups may be read.
void AddMatrix(const SwigluCase& c, std::string name, int64_t features, unsigned seed, Memory& memory);
SwigluInput MakeSwigluInput(const SwigluCase& c, const Addresses& addresses);

// What SwiGLU gives for rows that are in groups; zeros elsewhere.
struct SwigluRows {
  std::vector<uint16_t> h;        // [batch, tokens, features]
  std::vector<uint16_t> do1;      // [batch, tokens, 2 * features]
  std::vector<float> dweights;    // [batch, tokens]
  std::vector<float> block_sums;  // [batch, blocks of features, tokens]
};
// Without `dh` h alone.
SwigluRows SolveRows(const SwigluInput& input, bool aligned, const void* dh);
// Such a matrix as what the quantizers read.
Input InputOf(const SwigluInput& input, const std::vector<uint16_t>& rows, int64_t features);

#ifdef JAX_TSQ_HANDLERS
// Shapes of gate_up.
struct SwigluShape : InputShape {
  int64_t groups = 0;
  bool weighted = false;
};
SwigluShape MakeSwigluShape(Bytes& bytes);
// `group_sizes` is the number of that operand, behind which there may be weights.
SwigluShape SwigluShapeOf(const Frame& frame, size_t group_sizes);
// Whether features fit, and everything that a shape made of a frame cannot say.
bool IsRightShape(const SwigluShape& shape);
// Adds gate_up, what comes between, group_sizes and, maybe, weights.
void AddOperands(const SwigluShape& shape, const std::vector<FrameBuffer>& between, std::vector<FrameBuffer>& operands);
FrameAttribute LimitAttribute(Bytes& bytes);
// Whether these are all attributes, and `limit`.
bool HasFlagsAndLimit(const Frame& frame, const std::vector<std::string>& names);
float LimitOf(const Frame& frame);
SwigluInput SwigluInputOf(const Frame& frame, size_t group_sizes, bool pow_2_scales);
#endif

#ifdef JAX_TSQ_CUDA
struct SwigluSize {
  InputSize size;  // features are those of h
  std::string name;
  int64_t multiple;  // of which group sizes are
  int64_t used;      // their sum
};
std::vector<SwigluSize> SwigluSizes(const std::string& operation);
SwigluInput MakeBenchSwiglu(const SwigluSize& size, Arena& arena);
#endif

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_SWIGLU_INPUT_H_
