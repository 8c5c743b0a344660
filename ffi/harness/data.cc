#include "harness/data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "core/numerics.h"

namespace jax_tsq::harness {
namespace {

template <class T>
T Pick(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

uint16_t Bf16Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// What kind of numbers a column holds within 128 rows of x.
uint16_t EdgeBf16(std::mt19937& random, unsigned kind) {
  std::normal_distribution<float> normal;
  const uint16_t sign = random() % 2 ? 0x8000 : 0;
  switch (kind % 12) {
    case 0:
      return sign;
    case 1:
      return sign | 0x7FC0;
    case 2:
      return Pick<uint16_t>(random, {0x7FC0, 0x7F81, 0, 0}) | sign;
    case 3:
      return random() % 8 ? Bf16Bits(normal(random)) : static_cast<uint16_t>(sign | 0x7F80);
    case 4:
      return sign | random() % 0x80;  // subnormals
    case 5:
      return sign | (0x03DF + random() % 8);  // where 448 / amax overflows
    case 6:
      return sign | (0x7F70 + random() % 0x10);  // huge
    case 7:
      return random() % 8 ? Bf16Bits(normal(random)) : static_cast<uint16_t>(sign | 0x7FFF);
    case 8:
      return sign | (random() % 64 * 0x80);  // powers of two
    case 9:
      return Bf16Bits(448.0f * std::ldexp(1.0f, -static_cast<int>(random() % 20)) * (sign ? -1.0f : 1.0f));
    default:
      return Bf16Bits(normal(random) * std::ldexp(1.0f, static_cast<int>(kind % 60) - 30));
  }
}

// Number of the first column whose largest magnitude has the bits `i`, for each i. The last is how many there are.
const std::vector<int64_t>& FirstPairColumns() {
  static const std::vector<int64_t> first = [] {
    constexpr int64_t kFinite = 0x7F80;
    std::vector<int64_t> result(kFinite + 1, 0);
    for (int64_t i = 0; i < kFinite; ++i) result[i + 1] = result[i] + CeilDiv(2 * (i + 1), kBlock - 1);
    return result;
  }();
  return first;
}

uint16_t PairBf16(int64_t column, int64_t row) {
  const std::vector<int64_t>& first = FirstPairColumns();
  column = std::min(column, first.back() - 1);  // the last case repeats it
  const int64_t largest = std::upper_bound(first.begin(), first.end(), column) - first.begin() - 1;
  if (row == 0) return static_cast<uint16_t>(largest | (column % 2) << 15);
  const int64_t element = ((column - first[largest]) * (kBlock - 1) + row - 1) % (2 * (largest + 1));
  return static_cast<uint16_t>(element / 2 | (element % 2) << 15);
}

}  // namespace

void FillBf16(Data data, std::mt19937& random, int64_t rows, int64_t columns, int64_t first_column, uint16_t* x) {
  std::normal_distribution<float> normal;
  const unsigned salt = random();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      uint16_t bits = static_cast<uint16_t>(random());
      if (data == Data::kNormal) bits = Bf16Bits(normal(random));
      if (data == Data::kEdge) {
        bits = EdgeBf16(random, (static_cast<unsigned>(row / kBlock * 977 + column) * 2654435761u + salt) >> 8);
      }
      if (data == Data::kPairs) bits = PairBf16(first_column + column, row);
      std::memcpy(x++, &bits, sizeof(bits));
    }
  }
}

void FillFp8(Data data, std::mt19937& random, int64_t elements, uint8_t* x) {
  for (int64_t i = 0; i < elements; ++i) {
    uint8_t bits = static_cast<uint8_t>(random());
    if (data == Data::kNormal && (bits & 0x7F) == 0x7F) bits = 0x38;
    if (data == Data::kEdge) bits = Pick<uint8_t>(random, {0, 0x80, 0x7F, 0xFF, 1, 0x7E, 0x38, bits, bits});
    x[i] = bits;
  }
}

float RandomInputScale(Data data, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.001f, 1.0f);
  const float scale = uniform(random);
  if (data == Data::kNormal) return scale;
  if (data == Data::kWild) return std::ldexp(scale, static_cast<int>(random() % 270) - 140);
  return Pick<float>(random, {0.0f, INFINITY, NAN, 1e-38f, 1e-40f, 3e38f, 1e36f, -1.0f, scale, scale, scale, scale});
}

int64_t CountPairColumns() { return FirstPairColumns().back(); }

}  // namespace jax_tsq::harness
