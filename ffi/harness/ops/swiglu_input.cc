#include "harness/ops/swiglu_input.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/numerics.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

constexpr char kEveryGate[] = "every gate";

// --- Oracle ----------------------------------------------------------------------------------------------------------

struct Element {
  float silu, derivative;
};

Element Silu(float gate) {
  const float low = gate < -86.0f ? -86.0f : gate;
  const float c = std::isnan(low) || low > 86.0f ? 86.0f : low;
  const float shift = 12582912.0f;
  const float n = std::fma(c, -1.44269502162933349609375f, shift) - shift;
  const float r = std::fma(n, -0.693147182464599609375f, -c);
  float p = 0.0f;
  for (const float coefficient : {0x1.106250p-7f, 0x1.572a64p-5f, 0x1.5557b0p-3f, 0x1.fffdfcp-2f, 1.0f, 1.0f}) {
    p = std::fma(p, r, coefficient);
  }
  const float sigmoid = 1.0f / (1.0f + std::ldexp(p, static_cast<int>(n)));
  const float silu = low * sigmoid;
  return {silu, std::fma(silu, 1.0f - sigmoid, sigmoid)};
}

float Sum(const std::vector<float>& values, size_t first, size_t count) {
  if (count == 1) return values[first];
  return Sum(values, first, count / 2) + Sum(values, first + count / 2, count / 2);
}

float OneNan(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

float At(const void* matrix, int64_t index) { return DecodeBf16(static_cast<const uint16_t*>(matrix)[index]); }

}  // namespace

SwigluRows SolveRows(const SwigluInput& input, bool aligned, const void* dh) {
  const int64_t tokens = input.tokens, features = input.features, blocks = features / kBlock;
  SwigluRows result;
  result.h.resize(input.batch * tokens * features);
  result.do1.resize(2 * result.h.size());
  result.dweights.resize(input.weights == nullptr ? 0 : input.batch * tokens);
  result.block_sums.resize(result.dweights.size() * blocks);
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    const int64_t rows =
        RowsTaken(PlaceGroups(input.group_sizes + batch * input.groups, input.groups, tokens, aligned));
    for (int64_t row = batch * tokens; row < batch * tokens + rows; ++row) {
      const bool weighted = input.weights != nullptr;
      std::vector<float> products(features);
      for (int64_t i = 0; i < features; ++i) {
        const float gate = At(input.gate_up, row * 2 * features + i);
        const float up = At(input.gate_up, row * 2 * features + features + i);
        const float clamped_up = up > input.limit ? input.limit : up < -input.limit ? -input.limit : up;
        const Element element = Silu(gate > input.limit ? input.limit : gate);
        const float activation = element.silu * clamped_up;
        result.h[row * features + i] = EncodeBf16(weighted ? activation * input.weights[row] : activation);
        if (dh == nullptr) continue;
        const float gradient = At(dh, row * features + i);
        const float dactivation = weighted ? gradient * input.weights[row] : gradient;
        const float through_gate = dactivation * clamped_up;
        const float dgate = gate > input.limit ? 0.0f : through_gate * element.derivative;
        const float dup = std::fabs(up) > input.limit ? 0.0f : dactivation * element.silu;
        result.do1[row * 2 * features + i] = EncodeBf16(dgate);
        result.do1[row * 2 * features + features + i] = EncodeBf16(dup);
        products[i] = gradient * activation;
      }
      if (dh == nullptr || !weighted) continue;
      float total = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) {
        const float sum = Sum(products, block * kBlock, kBlock);
        result.block_sums[(batch * blocks + block) * tokens + row - batch * tokens] = OneNan(sum);
        total += sum;
      }
      result.dweights[row] = OneNan(total);
    }
  }
  return result;
}

Input InputOf(const SwigluInput& input, const std::vector<uint16_t>& rows, int64_t features) {
  return {InputType::kBf16, rows.data(), nullptr, input.batch, input.tokens, features, input.pow_2_scales};
}

// --- Cases -----------------------------------------------------------------------------------------------------------

std::string Describe(const SwigluCase& c) {
  return Describe(static_cast<const GroupCase&>(c)) + (c.weighted ? " weighted" : "") + " limit " +
         std::to_string(c.limit);
}

std::vector<SwigluCase> NamedSwigluCases() {
  std::vector<SwigluCase> cases;
  for (const GroupCase& group_case : NamedGroupCases()) {
    for (const int flags : {0, 1, 2, 3}) {
      SwigluCase c = {group_case};
      c.features = group_case.features == 0 ? 0 : group_case.features > 100 ? 2 * kBlock : kBlock;
      c.pow_2_scales = flags & 1;
      c.weighted = flags != 2;
      c.limit = flags & 2 ? 1.25f : kNoLimit;
      c.aligned = flags == 3;
      c.extra_blocks = flags;
      c.data = flags == 1 ? Data::kNormal : Data::kEdge;
      c.scales_offset = flags & 1;
      cases.push_back(c);
    }
  }
  SwigluCase gates = {MakeGroupCase(kEveryGate, 512, {512}, kBlock)};
  gates.data = Data::kNormal;
  cases.push_back(gates);
  return cases;
}

SwigluCase RandomSwigluCase(std::mt19937& random) {
  SwigluCase c = {RandomGroupCase(random)};
  c.type = InputType::kBf16;
  c.features = kBlock * Uniform(random, 1, 3);
  c.x_offset = 8 * static_cast<int>(random() % 3);
  c.out_offset = 16 * static_cast<int>(random() % 3);
  c.along_rows = random() % 2;
  c.weighted = random() % 3;
  if (random() % 3 == 0) c.limit = std::array<float, 3>{7.0f, 0.5f, 1e-3f}[random() % 3];
  return c;
}

std::vector<SwigluCase> ReplayedSwigluCases() {
  std::vector<SwigluCase> cases;
  for (const GroupCase& group_case : ReplayedGroupCases()) {
    SwigluCase c = {group_case};
    c.features = 2 * kBlock;
    cases.push_back(c);
  }
  return cases;
}

void AddMatrix(const SwigluCase& c, std::string name, int64_t features, unsigned seed, Memory& memory) {
  InputCase matrix = c;
  matrix.features = features;
  matrix.seed = c.seed + seed;
  Memory added;
  AddInputArrays(matrix, RowsInGroups(c), added);
  added[kX].name = std::move(name);
  memory.push_back(std::move(added[kX]));
}

void AddSwigluArrays(const SwigluCase& c, Memory& memory) {
  AddMatrix(c, "gate_up", 2 * c.features, 0, memory);
  if (c.name == kEveryGate) {
    for (int64_t i = 0; i < c.tokens * c.features; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(memory[kGateUp].data() + 2 * (i / c.features * 2 * c.features + i % c.features), &bits, sizeof(bits));
    }
  }
  std::mt19937 random(c.seed + 1);
  std::vector<float> weights(c.weighted ? c.batch * c.tokens : 0);
  for (float& weight : weights) weight = RandomInputScale(c.data, random);
  AddInput(memory, "weights", weights);
  if (c.weighted) {
    std::vector<Range> ranges;
    const std::vector<int64_t> rows = RowsInGroups(c);
    for (int64_t batch = 0; batch < c.batch; ++batch) {
      ranges.push_back({batch * c.tokens * sizeof(float), rows[batch] * sizeof(float)});
    }
    LimitReads(memory[kWeights], ranges);
  }
  AddInput(memory, "group_sizes", c.sizes);
}

SwigluInput MakeSwigluInput(const SwigluCase& c, const Addresses& addresses) {
  return {addresses[kGateUp],
          c.weighted ? reinterpret_cast<const float*>(addresses[kWeights]) : nullptr,
          reinterpret_cast<const int32_t*>(addresses[kGroupSizes]),
          c.batch,
          c.tokens,
          c.features,
          c.groups,
          c.pow_2_scales,
          c.limit};
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

SwigluShape MakeSwigluShape(Bytes& bytes) {
  SwigluShape shape;
  int64_t groups;
  static_cast<InputShape&>(shape) = MakeGroupShape(bytes, groups);
  shape.fp8 = bytes.Next() % 16 == 0;  // which is wrong
  shape.groups = groups;
  shape.weighted = bytes.Flag();
  if (shape.features < 1000 && bytes.Next() % 8 != 0) shape.features = bytes.Pick({0, 256, 256, 256, 512, 512});
  return shape;
}

SwigluShape SwigluShapeOf(const Frame& frame, size_t group_sizes) {
  SwigluShape shape;
  static_cast<InputShape&>(shape) = InputShapeOf(frame);
  shape.groups = Last(frame.operands[group_sizes]);
  shape.weighted = frame.operands.size() > group_sizes + 1;
  return shape;
}

bool IsRightShape(const SwigluShape& shape) {
  return !shape.fp8 && shape.groups >= 0 && shape.features % (2 * kBlock) == 0;
}

void AddOperands(const SwigluShape& shape, const std::vector<FrameBuffer>& between,
                 std::vector<FrameBuffer>& operands) {
  Add(operands, shape.fp8 ? kE4m3 : kBf16, shape.batch, {shape.tokens, shape.features});
  operands.insert(operands.end(), between.begin(), between.end());
  Add(operands, kS32, shape.batch, {shape.groups});
  if (shape.weighted) Add(operands, kF32, shape.batch, {shape.tokens});
}

FrameAttribute LimitAttribute(Bytes& bytes) {
  const float limit = bytes.Pick({0.0f, 0.0f, 7.0f, 0.25f, -1.0f, std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN()});
  return {"limit", XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_F32, FloatBits(limit)};
}

bool HasFlagsAndLimit(const Frame& frame, const std::vector<std::string>& names) {
  Frame flags = frame;
  const auto is_limit = [](const FrameAttribute& attribute) {
    return attribute.name == "limit" && attribute.kind == XLA_FFI_AttrType_SCALAR &&
           attribute.type == XLA_FFI_DataType_F32;
  };
  const auto limit = std::find_if(flags.attributes.begin(), flags.attributes.end(), is_limit);
  if (limit == flags.attributes.end()) return false;
  flags.attributes.erase(limit);
  return HasFlags(flags, names);
}

float LimitOf(const Frame& frame) {
  for (const FrameAttribute& attribute : frame.attributes) {
    if (attribute.name == "limit") {
      const float limit = BitsFloat(static_cast<uint32_t>(attribute.value));
      return limit > 0.0f ? limit : kNoLimit;
    }
  }
  return kNoLimit;
}

SwigluInput SwigluInputOf(const Frame& frame, size_t group_sizes, bool pow_2_scales) {
  const SwigluShape shape = SwigluShapeOf(frame, group_sizes);
  const Input gate_up = InputOf(frame, pow_2_scales);
  return {gate_up.x,
          shape.weighted ? static_cast<const float*>(frame.operands[group_sizes + 1].data) : nullptr,
          static_cast<const int32_t*>(frame.operands[group_sizes].data),
          gate_up.batch,
          gate_up.tokens,
          gate_up.features / 2,
          shape.groups,
          pow_2_scales,
          LimitOf(frame)};
}

#endif

// --- Benchmarks ------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::vector<SwigluSize> SwigluSizes(const std::string& operation) {
  std::vector<SwigluSize> sizes;
  for (const InputSize& size : {InputSize{32768, 2048, 8}, InputSize{32768, 4096, 32}, InputSize{65536, 2048, 64}}) {
    const auto add = [&](const std::string& kind, int64_t multiple, int64_t used) {
      sizes.push_back({size, operation + "-" + size.Name(kind), multiple, used});
    };
    add("", kBlock, size.tokens);
    add("-random", 1, size.tokens);
    add("-quarter-random", 1, size.tokens / 4);
  }
  return sizes;
}

SwigluInput MakeBenchSwiglu(const SwigluSize& size, Arena& arena) {
  const auto [tokens, features, groups, type, batch] = size.size;
  return {arena.Bf16(tokens * 2 * features),
          arena.Scales(tokens),
          arena.Upload(SpreadTokens(size.used, groups, size.multiple)),
          1,
          tokens,
          features,
          groups,
          false,
          kNoLimit};
}

#endif

}  // namespace jax_tsq::harness
