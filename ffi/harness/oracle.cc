#include "harness/oracle.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace jax_tsq::harness {
namespace {

constexpr int64_t kTokens = 128;  // of a block

uint16_t EncodeBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t round = 0x7FFF + (bits >> 16 & 1);
  return static_cast<uint16_t>((bits + round) >> 16);
}

// Values of the bytes 0x00 .. 0x7E, increasing.
const std::array<float, 127>& Fp8Values() {
  static const std::array<float, 127> values = [] {
    std::array<float, 127> result;
    for (int i = 0; i < 127; ++i) result[i] = DecodeFp8(static_cast<uint8_t>(i));
    return result;
  }();
  return values;
}

float QuantScaleOf(float amax, bool pow_2_scales) {
  if (amax == 0.0f) return 1.0f;
  if (std::isinf(amax)) return 0.0f;
  const float q = 448.0f / amax;
  if (std::isinf(q)) return pow_2_scales ? 0x1p127f : 0x1.FEp127f;
  if (!pow_2_scales) return q;
  int exponent;
  std::frexp(q, &exponent);
  return std::ldexp(1.0f, exponent - 1);
}

float Value(const Input& input, int64_t row, int64_t column) {
  const int64_t index = row * input.features + column;
  if (input.type == InputType::kBf16) return DecodeBf16(static_cast<const uint16_t*>(input.x)[index]);
  const float fp8 = DecodeFp8(static_cast<const uint8_t*>(input.x)[index]);
  const int64_t scales_per_row = (input.features + kTokens - 1) / kTokens;
  return DecodeBf16(EncodeBf16(fp8 * input.input_scales[row * scales_per_row + column / kTokens]));
}

// Rows [row, row + rows) of x as `stored` tokens of a result in which features are `pitch` apart.
void Block(const Input& input, int64_t row, int64_t rows, int64_t stored, int64_t pitch, uint8_t* out,
           float* dequant_scales) {
  for (int64_t column = 0; column < input.features; ++column) {
    std::vector<float> values(stored, 0.0f);
    float amax = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
      values[i] = Value(input, row + i, column);
      if (std::fabs(values[i]) > amax) amax = std::fabs(values[i]);
    }
    const float quant_scale = QuantScaleOf(amax, input.pow_2_scales);
    for (int64_t i = 0; i < stored; ++i) out[column * pitch + i] = EncodeFp8(values[i] * quant_scale);
    dequant_scales[column] = 1.0f / quant_scale;
  }
}

int64_t SizeTaken(const RaggedProblem& problem, int64_t batch, int64_t group, int64_t first_row) {
  int64_t size = std::max<int64_t>(problem.group_sizes[batch * problem.groups + group], 0);
  if (problem.aligned) size = size / kTokens * kTokens;
  return std::min(size, problem.input.tokens - first_row);
}

}  // namespace

float DecodeBf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float DecodeFp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const int mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(8.0f + mantissa, exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

uint8_t EncodeFp8(float value) {
  if (std::isnan(value)) return 0x7F;
  const auto& values = Fp8Values();
  const double magnitude = std::fabs(static_cast<double>(value));
  auto code = static_cast<int>(std::lower_bound(values.begin(), values.end(), magnitude) - values.begin());
  if (code == 127) {
    code = 126;
  } else if (code > 0) {
    const double up = values[code] - magnitude;
    const double down = magnitude - values[code - 1];
    if (down < up || (down == up && (code - 1) % 2 == 0)) --code;
  }
  return static_cast<uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

void SplitOracle(const SplitProblem& problem) {
  const Input& input = problem.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    for (const Expert& expert : problem.experts) {
      const int64_t blocks = (expert.tokens + kTokens - 1) / kTokens;
      uint8_t* out = expert.out + batch * input.features * expert.tokens;
      float* dequant_scales = expert.dequant_scales + batch * blocks * input.features;
      for (int64_t token = 0; token < expert.tokens; token += kTokens) {
        const int64_t rows = std::min(kTokens, expert.tokens - token);
        Block(input, batch * input.tokens + expert.first_token + token, rows, rows, expert.tokens, out + token,
              dequant_scales + token / kTokens * input.features);
      }
    }
  }
}

void RaggedOracle(const RaggedProblem& problem) {
  const Input& input = problem.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    float* dequant_scales = problem.dequant_scales + batch * problem.padded_tokens / kTokens * input.features;
    std::fill_n(values, input.features * problem.padded_tokens, uint8_t{0});
    std::fill_n(dequant_scales, problem.padded_tokens / kTokens * input.features, 1.0f);
    int64_t row = 0;
    int64_t start = 0;
    for (int64_t group = 0; group < problem.groups; ++group) {
      const int64_t size = SizeTaken(problem, batch, group, row);
      const int64_t padded = (size + kTokens - 1) / kTokens * kTokens;
      const int64_t pitch = problem.flat ? padded : problem.padded_tokens;
      uint8_t* out = values + (problem.flat ? input.features * start : start);
      for (int64_t token = 0; token < size; token += kTokens) {
        Block(input, batch * input.tokens + row + token, std::min(kTokens, size - token), kTokens, pitch, out + token,
              dequant_scales + (start + token) / kTokens * input.features);
      }
      problem.padded_sizes[batch * problem.groups + group] = static_cast<int32_t>(padded);
      row += size;
      start += padded;
    }
  }
}

int64_t RowsTaken(const RaggedProblem& problem, int64_t batch) {
  int64_t row = 0;
  for (int64_t group = 0; group < problem.groups; ++group) row += SizeTaken(problem, batch, group, row);
  return row;
}

}  // namespace jax_tsq::harness
