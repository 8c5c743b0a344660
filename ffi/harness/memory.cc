// The memory of a problem: sizes, positions and contents.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/groups.h"
#include "harness/cases.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

constexpr size_t kGuard = 64;

int64_t ScalesPitch(const Case& c) { return CeilDiv(c.features, kBlock); }
size_t ElementBytes(const Case& c) { return c.type == InputType::kBf16 ? 2 : 1; }
int64_t PaddedTokensOf(const Case& c) { return PaddedTokens(c.tokens, c.groups, c.aligned) + c.extra_blocks * kBlock; }

// Position of data of some bytes; advances `end` past it and a guard.
size_t Place(size_t& end, size_t bytes, size_t offset) {
  const size_t position = (end + kGuard + 15) / 16 * 16 + offset;
  end = position + bytes + kGuard;
  return position;
}

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

void FillX(const Case& c, std::mt19937& random, uint8_t* x) {
  std::normal_distribution<float> normal;
  const unsigned salt = random();
  for (int64_t row = 0; row < c.batch * c.tokens; ++row) {
    for (int64_t column = 0; column < c.features; ++column) {
      uint16_t bits = static_cast<uint16_t>(random());
      if (c.type == InputType::kFp8) {
        bits = c.data == Data::kNormal && (bits & 0x7F) == 0x7F ? 0x38 : bits & 0xFF;
        if (c.data == Data::kEdge) bits = Pick<uint16_t>(random, {0, 0x80, 0x7F, 0xFF, 1, 0x7E, 0x38, bits, bits});
        *x++ = static_cast<uint8_t>(bits);
        continue;
      }
      if (c.data == Data::kNormal) bits = Bf16Bits(normal(random));
      if (c.data == Data::kEdge) {
        bits = EdgeBf16(random, (static_cast<unsigned>(row / kBlock * 977 + column) * 2654435761u + salt) >> 8);
      }
      if (c.data == Data::kPairs) bits = PairBf16(c.first_column + column, row);
      std::memcpy(x, &bits, sizeof(bits));
      x += sizeof(bits);
    }
  }
}

float RandomInputScale(const Case& c, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.001f, 1.0f);
  const float scale = uniform(random);
  if (c.data == Data::kNormal) return scale;
  if (c.data == Data::kWild) return std::ldexp(scale, static_cast<int>(random() % 270) - 140);
  return Pick<float>(random, {0.0f, INFINITY, NAN, 1e-38f, 1e-40f, 3e38f, 1e36f, -1.0f, scale, scale, scale, scale});
}

// Where each expert's outputs lie, and the size of the whole.
struct SplitLayout {
  std::vector<size_t> out, dequant_scales;
  size_t out_end = 0;
  size_t dequant_scales_end = 0;
};

SplitLayout LayOut(const Case& c) {
  SplitLayout layout;
  for (const int64_t tokens : c.tokens_per_expert) {
    layout.out.push_back(Place(layout.out_end, c.batch * c.features * tokens, c.out_offset));
    layout.dequant_scales.push_back(Place(layout.dequant_scales_end,
                                          c.batch * CeilDiv(tokens, kBlock) * c.features * sizeof(float),
                                          c.scales_offset * sizeof(float)));
  }
  return layout;
}

}  // namespace

int64_t CountPairColumns() { return FirstPairColumns().back(); }

Memory MakeMemory(const Case& c) {
  Memory memory;
  const auto resize = [&](BufferName name, size_t bytes) { memory[name].assign(bytes, 0xFF); };
  // Inputs end where their allocation ends, so that memory checkers see a read past them.
  resize(kX, (c.x_offset + c.batch * c.tokens * c.features) * ElementBytes(c));
  if (c.type == InputType::kFp8) {
    resize(kInputScales, (c.scales_offset + c.batch * c.tokens * ScalesPitch(c)) * sizeof(float));
  }
  if (c.ragged) {
    const int64_t padded = PaddedTokensOf(c);
    resize(kGroupSizes, c.group_sizes.size() * sizeof(int32_t));
    resize(kOut, 2 * kGuard + c.out_offset + c.batch * c.features * padded);
    resize(kDequantScales, 2 * kGuard + (c.scales_offset + c.batch * padded / kBlock * c.features) * sizeof(float));
    resize(kPaddedSizes, 2 * kGuard + c.group_sizes.size() * sizeof(int32_t));
    if (!c.group_sizes.empty()) {
      std::memcpy(memory[kGroupSizes].data(), c.group_sizes.data(), memory[kGroupSizes].size());
    }
  } else {
    const SplitLayout layout = LayOut(c);
    resize(kOut, layout.out_end);
    resize(kDequantScales, layout.dequant_scales_end);
  }

  std::mt19937 random(c.seed);
  FillX(c, random, memory[kX].data() + c.x_offset * ElementBytes(c));
  for (size_t i = c.scales_offset; i < memory[kInputScales].size() / sizeof(float); ++i) {
    const float scale = RandomInputScale(c, random);
    std::memcpy(memory[kInputScales].data() + i * sizeof(float), &scale, sizeof(scale));
  }
  if (c.ragged) {
    // Garbage where nobody may read
    const Memory filled = memory;
    for (const BufferName name : {kX, kInputScales}) std::fill(memory[name].begin(), memory[name].end(), 0xFF);
    for (const Range& range : ReadableRanges(c, memory)) {
      const auto from = filled[range.buffer].begin() + range.offset;
      std::copy(from, from + range.bytes, memory[range.buffer].begin() + range.offset);
    }
  }
  return memory;
}

Addresses AddressesOf(Memory& memory) {
  Addresses addresses;
  for (int i = 0; i < kBuffers; ++i) addresses[i] = memory[i].data();
  return addresses;
}

namespace {

Input MakeInput(const Case& c, const Addresses& addresses) {
  const bool fp8 = c.type == InputType::kFp8;
  return {c.type,
          addresses[kX] + c.x_offset * ElementBytes(c),
          fp8 ? reinterpret_cast<const float*>(addresses[kInputScales]) + c.scales_offset : nullptr,
          c.batch,
          c.tokens,
          c.features,
          c.pow_2_scales};
}

}  // namespace

SplitProblem MakeSplit(const Case& c, const Addresses& addresses) {
  SplitProblem problem = {MakeInput(c, addresses), {}};
  const SplitLayout layout = LayOut(c);
  int64_t token = 0;
  for (size_t i = 0; i < c.tokens_per_expert.size(); ++i) {
    const int64_t tokens = c.tokens_per_expert[i];
    if (tokens == 0) {
      problem.experts.push_back({token, 0, nullptr, nullptr});
    } else {
      problem.experts.push_back({token, tokens, addresses[kOut] + layout.out[i],
                                 reinterpret_cast<float*>(addresses[kDequantScales] + layout.dequant_scales[i])});
    }
    token += tokens;
  }
  return problem;
}

RaggedProblem MakeRagged(const Case& c, const Addresses& addresses) {
  return {MakeInput(c, addresses),
          reinterpret_cast<const int32_t*>(addresses[kGroupSizes]),
          c.groups,
          PaddedTokensOf(c),
          c.aligned,
          c.flat,
          addresses[kOut] + kGuard + c.out_offset,
          reinterpret_cast<float*>(addresses[kDequantScales] + kGuard) + c.scales_offset,
          reinterpret_cast<int32_t*>(addresses[kPaddedSizes] + kGuard)};
}

std::vector<Range> ReadableRanges(const Case& c, Memory& memory) {
  std::vector<Range> ranges = {{kGroupSizes, 0, memory[kGroupSizes].size()}};
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    const int64_t rows = c.ragged ? RowsTaken(MakeRagged(c, AddressesOf(memory)), batch) : c.tokens;
    const int64_t row = batch * c.tokens;
    ranges.push_back({kX, (c.x_offset + row * c.features) * ElementBytes(c), rows * c.features * ElementBytes(c)});
    if (c.type != InputType::kFp8) continue;
    ranges.push_back({kInputScales, (c.scales_offset + row * ScalesPitch(c)) * sizeof(float),
                      rows * ScalesPitch(c) * sizeof(float)});
  }
  return ranges;
}

}  // namespace jax_tsq::harness
