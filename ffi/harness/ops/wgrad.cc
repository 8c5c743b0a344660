// ragged_weight_gradient in the harness.

#include "wgrad/wgrad.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <sstream>
#include <utility>

#include "core/limits.h"
#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/product.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include "harness/cuda_errors.h"
#include "harness/ops/product_cuda.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(WgradCuda);
#endif

#if defined(JAX_TSQ_HANDLERS) && !defined(JAX_TSQ_CUDA)
namespace jax_tsq {

// In place of the kernel, to see the handler's part.
const char* WgradOnCuda(const WgradProblem& p, Stream) {
  const int64_t blocks = p.tokens / kBlock;
  const int64_t bytes = p.batch * p.groups * p.x_features * p.dy_features * (p.dw_is_bf16 ? 2 : 4);
  harness::FillWithSum({{p.x, p.batch * p.x_features * p.tokens},
                        {p.x_scales, p.batch * blocks * p.x_features * 4},
                        {p.dy, p.batch * p.dy_features * p.tokens},
                        {p.dy_scales, p.batch * blocks * p.dy_features * 4},
                        {p.group_sizes, p.batch * p.groups * 4},
                        {p.accumulator, p.accumulator == nullptr ? 0 : bytes}},
                       p.dw, bytes);
  return nullptr;
}

}  // namespace jax_tsq
#endif

namespace jax_tsq::harness {
namespace {

// Into what memory the second call of a test adds dW.
enum class Accumulate { kNone, kInPlace, kFromACopy };

struct WgradCase {
  const char* name;
  int64_t x_features, dy_features, tokens;
  Sizes sizes;  // [batch, groups]
  int64_t batch = 1;
  Numbers numbers = Numbers::kNormal;
  bool dw_is_bf16 = false;
  int64_t multiprocessors = 0;
  Accumulate accumulate = Accumulate::kNone;

  int64_t Groups() const { return static_cast<int64_t>(sizes.size()) / batch; }
  int64_t Blocks() const { return tokens / kBlock; }
  size_t Results() const { return sizes.size() * x_features * dy_features; }
  std::vector<PlacedGroup> Placed(int64_t index) const {
    return PlaceGroups(sizes.data() + index * Groups(), Groups(), tokens, true);
  }
};

class WgradTest : public Test {
 public:
  explicit WgradTest(WgradCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override {
    std::ostringstream text;
    text << (c_.dw_is_bf16 ? "bf16" : "f32")
         << (c_.accumulate == Accumulate::kNone      ? ""
             : c_.accumulate == Accumulate::kInPlace ? " added in place"
                                                     : " added to a copy")
         << " batch " << c_.batch << " features " << c_.x_features << " and " << c_.dy_features << " tokens "
         << c_.tokens << " groups " << c_.Groups();
    return text.str();
  }

  Memory MakeMemory() const override {
    Memory memory;
    std::mt19937 random(1);
    AddOperand("x", "x_scales", c_.x_features, random, memory);
    AddOperand("dy", "dy_scales", c_.dy_features, random, memory);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "dw", c_.Results() * (c_.dw_is_bf16 ? 2 : 4));
    if (c_.accumulate == Accumulate::kNone) return memory;
    std::vector<float> accumulator(c_.Results());
    for (float& value : accumulator) value = RandomTerm(random);
    AddInput(memory, "accumulator", accumulator);
    AddOutput(memory, "sum", c_.Results() * 4);
    if (c_.accumulate == Accumulate::kInPlace && c_.Results() > 0) {
      std::memcpy(memory[kSum].data(), accumulator.data(), c_.Results() * 4);
    }
    return memory;
  }

  bool IsExact() const override { return false; }
  // Against plain sums in double precision.
  std::string Compare(const Memory& expected, const Memory& got) const override {
    const std::string guard = FindBrokenGuard(got);
    if (!guard.empty()) return guard;
    const std::string wrong = CompareProduct(c_.numbers, c_.dw_is_bf16, MakeSums(expected), got[kDw]);
    if (!wrong.empty() || c_.accumulate == Accumulate::kNone) return wrong;
    std::vector<bool> is_added;  // each element of dW: not those of groups without tokens
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      for (const PlacedGroup& group : c_.Placed(batch)) {
        is_added.insert(is_added.end(), c_.x_features * c_.dy_features, group.rows > 0);
      }
    }
    return CompareAdded(is_added, got[kAccumulator], got[kDw], got[kSum]);
  }

#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& a, Stream stream) const override {
    WgradProblem problem = {a[kX],
                            reinterpret_cast<const float*>(a[kXScales]),
                            a[kDy],
                            reinterpret_cast<const float*>(a[kDyScales]),
                            reinterpret_cast<const int32_t*>(a[kGroupSizes]),
                            nullptr,
                            a[kDw],
                            c_.dw_is_bf16,
                            c_.batch,
                            c_.Groups(),
                            c_.x_features,
                            c_.dy_features,
                            c_.tokens,
                            c_.multiprocessors};
    const char* const error = WgradOnCuda(problem, stream);
    if (error != nullptr || c_.accumulate == Accumulate::kNone) return error;
    problem.accumulator = a[c_.accumulate == Accumulate::kInPlace ? kSum : kAccumulator];
    problem.dw = a[kSum];
    return WgradOnCuda(problem, stream);
  }
#endif

 private:
  enum { kX, kXScales, kDy, kDyScales, kGroupSizes, kDw, kAccumulator, kSum };

  // Blocks of no group hold NaN, which nobody may use.
  void AddOperand(const char* name, const char* scales_name, int64_t features, std::mt19937& random,
                  Memory& memory) const {
    std::vector<uint8_t> values(c_.batch * features * c_.tokens, 0x7F);
    std::vector<float> scales(c_.batch * c_.Blocks() * features, NAN);
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      const int64_t used = RowsTaken(c_.Placed(batch)) / kBlock;
      for (int64_t block = 0; block < used; ++block) {
        for (int64_t i = 0; i < features; ++i) {
          scales[(batch * c_.Blocks() + block) * features + i] = RandomScale(c_.numbers, random, i);
          FillFp8Operand(c_.numbers, random, kBlock, &values[(batch * features + i) * c_.tokens + block * kBlock]);
        }
      }
    }
    AddInput(memory, name, values);
    AddInput(memory, scales_name, scales);
  }

  std::vector<ProductSum> MakeSums(const Memory& memory) const {
    const auto* x_scales = reinterpret_cast<const float*>(memory[kXScales].bytes.data());
    const auto* dy_scales = reinterpret_cast<const float*>(memory[kDyScales].bytes.data());
    std::vector<ProductSum> sums;
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      for (const PlacedGroup& group : c_.Placed(batch)) {
        for (int64_t k = 0; k < c_.x_features; ++k) {
          for (int64_t n = 0; n < c_.dy_features; ++n) {
            ProductSum result;
            for (int64_t row = group.first_row; row < group.first_row + group.rows; row += kBlock) {
              const int64_t block = batch * c_.Blocks() + row / kBlock;
              const float scale = x_scales[block * c_.x_features + k] * dy_scales[block * c_.dy_features + n];
              result.Add(&memory[kX].bytes[(batch * c_.x_features + k) * c_.tokens + row],
                         &memory[kDy].bytes[(batch * c_.dy_features + n) * c_.tokens + row], kBlock, scale);
            }
            sums.push_back(result);
          }
        }
      }
    }
    return sums;
  }

  const WgradCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

Tests NamedTests() {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  Sizes many(1024, 0);
  for (int i = 0; i < 1024; i += 7) many[i] = 128 * (i % 3);
  Tests tests;
  for (WgradCase c : std::vector<WgradCase>{
           {"one block", 192, 128, 128, {128}},
           {"one tile of many blocks", 192, 128, 2048, {2048}},
           {"smallest", 4, 8, 128, {128}},
           {"partial tiles", 260, 200, 1024, {384, 0, 512, 128}},
           {"more columns than rows", 200, 1032, 768, {128, 640}},
           {"tail of no group", 388, 136, 1280, {256, 0, 384}},
           {"nothing but empty groups", 200, 136, 512, {0, 0, 0}},
           {"no tokens", 64, 64, 0, {0, 5, -1}},
           {"no groups", 64, 64, 256, {}},
           {"broken sizes", 196, 136, 1024, {-5, 200, kLeast, 300, 127, kMost, kMost, 128}},
           {"sizes that overflow", 64, 72, 512, Sizes(300, kMost)},
           {"large and small groups", 196, 136, 128 * 40, {1024, 128, 0, 2048, 256, 1152, 384}},
           {"large groups and a small one", 196, 136, 128 * 45, {1024, 1280, 128, 2048, 1152}},
           {"many groups", 36, 40, 128 * 160, many},
           {"as many tiles as make several lists", 192, 128, 2560, Sizes(1024, 0)},
           {"batches", 260, 72, 640, {128, 512, 0, 256, 256, 256}, 2},
           {"wild scales", 260, 136, 1024, {384, 128, 512}, 1, Numbers::kWildScales},
           {"exact sums", 260, 136, 128 * 45, {1024, 1280, 128, 0, 1152}, 1, Numbers::kExact},
           {"few multiprocessors", 584, 264, 1024, {384, 128, 512}, 1, Numbers::kExact, false, 3},
       }) {
    for (const bool bf16 : {false, true}) {
      c.dw_is_bf16 = bf16;
      tests.push_back(std::make_unique<WgradTest>(c));
    }
    c.dw_is_bf16 = false;
    for (const Accumulate accumulate : {Accumulate::kInPlace, Accumulate::kFromACopy}) {
      c.accumulate = accumulate;
      tests.push_back(std::make_unique<WgradTest>(c));
    }
  }
  return tests;
}

Tests ReplayedTests() {
  Tests tests;
  for (const Sizes& sizes :
       std::vector<Sizes>{{0, 1280, 0, 0}, {128, 256, 512, 384}, {384, 0, 128, 0}, {0, 0, 0, 1280}}) {
    WgradCase c = {"replay", 260, 136, 1280, sizes};
    c.accumulate = Accumulate::kFromACopy;  // also dW alone, before
    tests.push_back(std::make_unique<WgradTest>(c));
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

struct Shape {
  Dims batch;
  int64_t x_features, dy_features, tokens, groups;
  bool bf16, accumulate;
  FrameAttribute multiprocessors;
};

Frame MakeFrame(const Shape& s) {
  Frame frame;
  Add(frame.operands, kE4m3, s.batch, {s.x_features, s.tokens});
  Add(frame.operands, kF32, s.batch, {s.tokens / 128, s.x_features});
  Add(frame.operands, kE4m3, s.batch, {s.dy_features, s.tokens});
  Add(frame.operands, kF32, s.batch, {s.tokens / 128, s.dy_features});
  Add(frame.operands, kS32, s.batch, {s.groups});
  Add(frame.results, s.bf16 ? kBf16 : kF32, s.batch, {s.groups, s.x_features, s.dy_features});
  if (s.accumulate) frame.operands.push_back(frame.results[0]);
  frame.attributes = {s.multiprocessors};
  return frame;
}

Frame MakeWgradCall(Bytes& bytes) {
  const int64_t multiple = bytes.Pick({8, 8, 4, 1});
  Shape s;
  s.batch = SmallBatch(bytes);
  s.x_features = SmallSize(bytes) / 4 * multiple;
  s.dy_features = SmallSize(bytes) / 4 * multiple;
  s.tokens = bytes.Next() % 8 ? bytes.Next() % 5 * 128 : SmallSize(bytes);
  s.groups = bytes.Next() % 16 ? bytes.Next() % 6 : kMostProductGroups + bytes.Next() % 2;
  s.bf16 = bytes.Flag();
  s.accumulate = bytes.Flag();
  s.multiprocessors = Multiprocessors(bytes);
  if (bytes.Next() % 8 == 0) {
    s.batch.resize(1, 1);
    MakeHuge(bytes, {&s.batch[0], &s.tokens, &s.x_features, &s.dy_features});
  }
  return MakeFrame(s);
}

bool IsRightCall(const Frame& frame) {
  const bool accumulate = frame.operands.size() == 6;
  if ((frame.operands.size() != 5 && !accumulate) || frame.results.size() != 1 || frame.operands[2].dims.size() < 2) {
    return false;
  }
  if (!HasMultiprocessors(frame) || !HasFlags(frame, {}, 1)) return false;
  const Dims &x = frame.operands[0].dims, &dy = frame.operands[2].dims;
  const Shape s = {
      Dims(x.begin(), x.end() - 2),   x[x.size() - 2], dy[dy.size() - 2],  x.back(), Last(frame.operands[4]),
      frame.results[0].type == kBf16, accumulate,      frame.attributes[0]};
  return !(s.bf16 && accumulate) && SameBuffers(frame, MakeFrame(s)) && !IsTooLarge(dy) &&
         !IsTooLarge(frame.operands[4].dims) && !IsTooLarge(frame.results[0].dims) && s.tokens <= kMostTokens &&
         s.x_features <= kMostProductFeatures && s.dy_features <= kMostProductFeatures && s.tokens % 128 == 0 &&
         s.x_features % 4 == 0 && s.dy_features % (s.bf16 ? 8 : 4) == 0 && s.groups <= kMostProductGroups;
}

bool IsAlignedCall(const Frame& frame) {
  return std::all_of(frame.operands.begin(), frame.operands.begin() + 4, IsAligned) && IsAligned(frame.results[0]);
}

#endif

#ifdef JAX_TSQ_CUDA

// What is timed: dW in either dtype, dW added to an accumulator by the kernel, or float32 dW that is added afterwards.
enum class Kind { kF32, kBf16, kAccumulate, kStoreAndAdd };

Prepared Prepare(const ProductSize& size, const Sizes& sizes, Kind kind, Arena& arena) {
  const bool bf16 = kind == Kind::kBf16;
  const size_t results = size.groups * size.x_features * size.dy_features;
  WgradProblem problem = {};
  problem.x = arena.Fp8(size.tokens * size.x_features);
  problem.x_scales = arena.Scales(size.tokens / kBlock * size.x_features);
  problem.dy = arena.Fp8(size.tokens * size.dy_features);
  problem.dy_scales = arena.Scales(size.tokens / kBlock * size.dy_features);
  problem.group_sizes = arena.Upload(sizes);
  problem.dw = arena.AllocateBytes(results * (bf16 ? 2 : 4));
  float* const sum = static_cast<float*>(kind == Kind::kStoreAndAdd ? arena.AllocateBytes(results * 4) : problem.dw);
  if (kind == Kind::kAccumulate) problem.accumulator = sum;
  problem.dw_is_bf16 = bf16;
  problem.batch = 1;
  problem.groups = size.groups;
  problem.x_features = size.x_features;
  problem.dy_features = size.dy_features;
  problem.tokens = size.tokens;
  // A sum over the tokens of a group, with a scale for each block of them
  const auto element = [problem, sizes, sum](std::mt19937& random) -> Element {
    const int64_t group = random() % problem.groups, k = random() % problem.x_features,
                  n = random() % problem.dy_features;
    const PlacedGroup placed = PlaceGroups(sizes.data(), problem.groups, problem.tokens, true)[group];
    const int64_t block = placed.first_row / kBlock;
    const size_t index = (group * problem.x_features + k) * problem.dy_features + n;
    return {problem.x + k * problem.tokens + placed.first_row,
            {problem.x_scales + block * problem.x_features + k, problem.x_features},
            problem.dy + n * problem.tokens + placed.first_row,
            {problem.dy_scales + block * problem.dy_features + n, problem.dy_features},
            placed.rows,
            reinterpret_cast<const uint8_t*>(sum) + index * (problem.dw_is_bf16 ? 2 : 4),
            problem.dw_is_bf16};
  };
  const auto launch = [=] {
    const char* const error = WgradOnCuda(problem, nullptr);
    if (error == nullptr && kind == Kind::kStoreAndAdd) AddFloats(sum, static_cast<const float*>(problem.dw), results);
    return error;
  };
  return {launch, [=] {
            if (kind == Kind::kAccumulate || kind == Kind::kStoreAndAdd) {  // once more, from zeros
              CheckCuda(cudaMemset(sum, 0, results * 4));
              CheckLaunch(launch());
            }
            return RelativeError(element);
          }};
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  for (const ProductSize& size : ProductSizes()) {
    const Sizes sizes = SpreadTokens(size.tokens, size.groups, kBlock);
    for (const auto& [name, kind] :
         std::initializer_list<std::pair<std::string, Kind>>{{"f32-", Kind::kF32},
                                                             {"bf16-", Kind::kBf16},
                                                             {"add-", Kind::kAccumulate},
                                                             {"then-add-", Kind::kStoreAndAdd}}) {
      benchmarks.push_back({"wgrad-" + name + size.Name(), 0, 2.0 * size.tokens * size.x_features * size.dy_features,
                            [=, kind = kind](Arena& arena) { return Prepare(size, sizes, kind, arena); }});
    }
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "wgrad";
  operation.on_cpu = false;
  operation.needs_sm90 = true;
  operation.named = NamedTests;
  operation.replayed = ReplayedTests;
#ifdef JAX_TSQ_CUDA
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {WgradCuda, MakeWgradCall, IsRightCall, IsAlignedCall, ExpectSum};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
