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

}  // namespace

uint16_t EncodeBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t round = 0x7FFF + (bits >> 16 & 1);
  return static_cast<uint16_t>((bits + round) >> 16);
}

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

float QuantizeTogether(const std::vector<float>& values, bool pow_2_scales, uint8_t* out) {
  float amax = 0.0f;
  for (const float value : values) {
    if (std::fabs(value) > amax) amax = std::fabs(value);
  }
  const float quant_scale = QuantScaleOf(amax, pow_2_scales);
  for (size_t i = 0; i < values.size(); ++i) out[i] = EncodeFp8(values[i] * quant_scale);
  return 1.0f / quant_scale;
}

void QuantizeColumns(const Input& input, int64_t row, int64_t rows, int64_t stored, int64_t pitch, uint8_t* out,
                     float* dequant_scales) {
  for (int64_t column = 0; column < input.features; ++column) {
    std::vector<float> values(stored, 0.0f);
    for (int64_t i = 0; i < rows; ++i) values[i] = Value(input, row + i, column);
    dequant_scales[column] = QuantizeTogether(values, input.pow_2_scales, out + column * pitch);
  }
}

void QuantizeRows(const Input& input, int64_t batch, int64_t rows, uint8_t* values, float* dequant_scales) {
  for (int64_t row = 0; row < input.tokens; ++row) {
    for (int64_t column = 0; column < input.features; column += kTokens) {
      std::vector<float> block(std::min(kTokens, input.features - column), 0.0f);
      for (size_t i = 0; i < block.size() && row < rows; ++i)
        block[i] = Value(input, batch * input.tokens + row, column + i);
      dequant_scales[column / kTokens * input.tokens + row] =
          QuantizeTogether(block, input.pow_2_scales, values + row * input.features + column);
    }
  }
}

std::vector<PlacedGroup> PlaceGroups(const int32_t* sizes, int64_t groups, int64_t tokens, bool aligned) {
  std::vector<PlacedGroup> placed;
  int64_t row = 0, padded_row = 0;
  for (int64_t group = 0; group < groups; ++group) {
    int64_t size = std::max<int64_t>(sizes[group], 0);
    if (aligned) size = size / kTokens * kTokens;
    const int64_t rows = std::min(size, tokens - row);
    const int64_t padded = (rows + kTokens - 1) / kTokens * kTokens;
    placed.push_back({row, rows, padded_row, padded});
    row += rows;
    padded_row += padded;
  }
  return placed;
}

int64_t RowsTaken(const std::vector<PlacedGroup>& groups) {
  return groups.empty() ? 0 : groups.back().first_row + groups.back().rows;
}

void QuantizeGroups(const Input& input, const int32_t* sizes, int64_t groups, bool aligned,
                    const PaddedResult& result) {
  const int64_t padded_tokens = result.padded_tokens;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    uint8_t* values = result.values + batch * input.features * padded_tokens;
    float* dequant_scales = result.dequant_scales + batch * padded_tokens / kTokens * input.features;
    std::fill_n(values, input.features * padded_tokens, uint8_t{0});
    std::fill_n(dequant_scales, padded_tokens / kTokens * input.features, 1.0f);
    int32_t* padded_size = result.padded_sizes + batch * groups;
    for (const PlacedGroup& group : PlaceGroups(sizes + batch * groups, groups, input.tokens, aligned)) {
      const int64_t pitch = result.flat ? group.padded : padded_tokens;
      uint8_t* out = values + (result.flat ? input.features * group.first_padded : group.first_padded);
      for (int64_t token = 0; token < group.rows; token += kTokens) {
        QuantizeColumns(input, batch * input.tokens + group.first_row + token,
                        std::min<int64_t>(kTokens, group.rows - token), kTokens, pitch, out + token,
                        dequant_scales + (group.first_padded + token) / kTokens * input.features);
      }
      *padded_size++ = static_cast<int32_t>(group.padded);
    }
  }
}

}  // namespace jax_tsq::harness
