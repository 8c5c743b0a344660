#include "harness/ops/product.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

const std::array<double, 256>& DecodedFp8() {
  static const std::array<double, 256> decoded = [] {
    std::array<double, 256> values;
    for (int i = 0; i < 256; ++i) values[i] = DecodeFp8(static_cast<uint8_t>(i));
    return values;
  }();
  return decoded;
}

float ValueAt(const uint8_t* result, size_t i, bool bf16) {
  if (bf16) {
    uint16_t bits;
    std::memcpy(&bits, result + i * 2, sizeof(bits));
    return DecodeBf16(bits);
  }
  float value;
  std::memcpy(&value, result + i * 4, sizeof(value));
  return value;
}

// A sum that float32 holds, as the result has it.
float Rounded(double value, bool bf16) {
  return bf16 ? DecodeBf16(EncodeBf16(static_cast<float>(value))) : static_cast<float>(value);
}

}  // namespace

void FillFp8Operand(Numbers numbers, std::mt19937& random, int64_t count, uint8_t* values) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    const bool exact = numbers == Numbers::kExact;
    values[i] = EncodeFp8(exact ? static_cast<float>(random() % 5) - 2.0f : 150.0f * normal(random));
  }
}

float RandomScale(Numbers numbers, std::mt19937& random, int64_t position) {
  constexpr float kWild[] = {0.0f, 1e-40f, 0x1p127f, 0x1p-120f, 1.0f, 1.0f, INFINITY, NAN};
  if (numbers == Numbers::kExact) return std::ldexp(1.0f, -static_cast<int>(random() % 4));
  if (numbers == Numbers::kWildScales && position % 4 == 0) return kWild[random() % (position % 64 == 0 ? 8 : 6)];
  return std::ldexp(1.0f + random() % 1024 / 1024.0f, -static_cast<int>(random() % 6));
}

void ProductSum::Add(const uint8_t* a, const uint8_t* b, int64_t count, float scale) {
  const std::array<double, 256>& decoded = DecodedFp8();
  double sum = 0.0, largest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double product = decoded[a[i]] * decoded[b[i]];
    sum += product;
    largest = std::max(largest, std::fabs(product));
  }
  value += sum * scale;
  // The tensor cores cut every product off at 2^-13 of the largest.
  bound += count * largest * 0x1p-13 * scale;
  // A sum in float32 has overflowed, whatever follows; or it may have, within its error.
  if (std::fabs(value) - bound > std::numeric_limits<float>::max()) value = NAN;
  may_overflow |= std::fabs(value) + bound > 0x1.FEp127;
}

std::string CompareProduct(Numbers numbers, bool bf16, const std::vector<ProductSum>& sums, const Array& result) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const float value = ValueAt(result.bytes.data() + result.start, i, bf16);
    const auto [want, bound, may_overflow] = sums[i];
    const auto complaint = [&, want = want](const char* what) {
      std::ostringstream text;
      text << what << " " << i << " of " << sums.size() << ": expected " << want << ", got " << value;
      return text.str();
    };
    if (!std::isfinite(want)) {
      if (std::isfinite(value)) return complaint("finite value");
      continue;
    }
    if (may_overflow && !std::isfinite(value)) continue;
    if (numbers == Numbers::kExact) {
      if (value != Rounded(want, bf16)) return complaint("inexact value");
      continue;
    }
    const double rounding = bf16 ? std::fabs(want) * 0x1p-8 : 0.0;
    if (!(std::fabs(value - want) <= bound + rounding + 1e-37)) return complaint("value");
    error += (value - want) * (value - want);
    norm += want * want;
  }
  const bool far = std::sqrt(error) > (bf16 ? 2e-3 : 2e-4) * std::sqrt(norm);
  return numbers == Numbers::kNormal && sums.size() > 1000 && far ? "the error is too large" : "";
}

float RandomTerm(std::mt19937& random) {
  constexpr float kOthers[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, 0x1p127f, -0x1p-126f};
  if (random() % 16 == 0) return kOthers[random() % std::size(kOthers)];
  return std::ldexp(static_cast<float>(random() % 4096) - 2048.0f, static_cast<int>(random() % 24) - 12);
}

std::string CompareAdded(const std::vector<bool>& is_added, const Array& terms, const Array& products,
                         const Array& sums) {
  const auto same = [](float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; };
  const auto flush = [](float value) { return std::fpclassify(value) == FP_SUBNORMAL ? value * 0.0f : value; };
  for (size_t i = 0; i < is_added.size(); ++i) {
    const auto [term, product, sum] = std::array{ValueAt(terms.bytes.data() + terms.start, i, false),
                                                 ValueAt(products.bytes.data() + products.start, i, false),
                                                 ValueAt(sums.bytes.data() + sums.start, i, false)};
    const float expected = is_added[i] ? term + product : term;
    if (same(sum, expected)) continue;
    // The copy engine may take subnormal numbers for zeros of their sign, and makes NaN of its own.
    if (is_added[i] && same(sum, flush(flush(term) + flush(product)))) continue;
    if (is_added[i] && std::isnan(sum) && std::isnan(expected)) continue;
    std::ostringstream text;
    text << "sum " << i << " of " << is_added.size() << ": " << term << (is_added[i] ? " + " : ", without ") << product
         << " is " << expected << ", got " << sum;
    return text.str();
  }
  return "";
}

}  // namespace jax_tsq::harness
