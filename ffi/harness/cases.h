// Problems to check: by name where something once seemed likely to break, and at random.

#ifndef JAX_TSQ_HARNESS_CASES_H_
#define JAX_TSQ_HARNESS_CASES_H_

#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "ragged/ragged.h"
#include "split/split.h"

namespace jax_tsq::harness {

enum class Data {
  kNormal,
  kWild,   // any bits
  kEdge,   // NaN, infinities, zeros, subnormals and thresholds of the scale, by column and token block
  kPairs,  // in every column a bf16 and some of those that are not larger, of both signs
};

struct Case {
  std::string name;
  bool ragged = false;
  InputType type = InputType::kBf16;
  bool pow_2_scales = false;
  Data data = Data::kEdge;
  int64_t batch = 1;
  int64_t tokens = 0;
  int64_t features = 0;
  std::vector<int64_t> tokens_per_expert;  // split
  int64_t groups = 0;                      // from here on ragged
  std::vector<int32_t> group_sizes;        // [batch, groups]
  bool aligned = false;
  bool flat = false;
  int64_t extra_blocks = 0;  // in the padded result
  // Distance in elements from the alignment of an allocation
  int x_offset = 0;
  int out_offset = 0;
  int scales_offset = 0;
  unsigned seed = 1;
  int64_t first_column = 0;  // of kPairs: its number among all columns of all cases
};

std::vector<Case> NamedCases();
Case RandomCase(std::mt19937& random);
// Cases that together hold every finite bf16 element beside every finite block maximum.
int64_t CountPairColumns();
int64_t CountPairCases();
Case PairCase(int64_t index, bool pow_2_scales);
std::string Describe(const Case& c);

// The memory of a problem. Outputs are full of 0xFF, which no kernel may write: it is neither a float8 result nor a
// scale nor a size. So are the gaps around each output, the gap before x and the rows of x that nobody may read.
enum BufferName { kX, kInputScales, kGroupSizes, kOut, kDequantScales, kPaddedSizes, kBuffers };
inline constexpr std::array<const char*, kBuffers> kBufferNames = {"x",   "input_scales",   "group_sizes",
                                                                   "out", "dequant_scales", "padded_sizes"};
using Memory = std::array<std::vector<uint8_t>, kBuffers>;
using Addresses = std::array<uint8_t*, kBuffers>;

struct Range {
  BufferName buffer;
  size_t offset;
  size_t bytes;
};

Memory MakeMemory(const Case& c);
Addresses AddressesOf(Memory& memory);
SplitProblem MakeSplit(const Case& c, const Addresses& addresses);
RaggedProblem MakeRagged(const Case& c, const Addresses& addresses);
// The inputs that a kernel may read.
std::vector<Range> ReadableRanges(const Case& c, Memory& memory);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_CASES_H_
