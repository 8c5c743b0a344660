// ragged_matmul in the harness.

#include "matmul/matmul.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <sstream>

#include "core/limits.h"
#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/product.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include "harness/ops/product_cuda.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulCuda);
#endif

#if defined(JAX_TSQ_HANDLERS) && !defined(JAX_TSQ_CUDA)
namespace jax_tsq {

// In place of the kernel, to see the handler's part.
const char* MatmulOnCuda(const MatmulProblem& p, Stream) {
  const int64_t blocks = CeilDiv(p.features, kBlock), column_blocks = CeilDiv(p.columns, kBlock);
  harness::FillWithSum({{p.x, p.batch * p.tokens * p.features},
                        {p.x_scales, p.batch * p.tokens * blocks * 4},
                        {p.w, p.batch * p.groups * p.columns * p.features},
                        {p.w_scales, p.batch * p.groups * blocks * column_blocks * 4},
                        {p.group_sizes, p.batch * p.groups * 4}},
                       p.y, p.batch * p.tokens * p.columns * 2);
  return nullptr;
}

}  // namespace jax_tsq
#endif

namespace jax_tsq::harness {
namespace {

struct MatmulCase {
  const char* name;
  int64_t tokens, features, columns;
  Sizes sizes;  // [batch, groups]
  int64_t batch = 1;
  Numbers numbers = Numbers::kNormal;
  int64_t multiprocessors = 0;
  bool w_scales_by_column = false;

  int64_t Groups() const { return static_cast<int64_t>(sizes.size()) / batch; }
  int64_t Blocks() const { return CeilDiv(features, kBlock); }
  int64_t ColumnBlocks() const { return CeilDiv(columns, kBlock); }
  std::vector<PlacedGroup> Placed(int64_t index) const {
    return PlaceGroups(sizes.data() + index * Groups(), Groups(), tokens, false);
  }
};

class MatmulTest : public Test {
 public:
  explicit MatmulTest(MatmulCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override {
    std::ostringstream text;
    text << "batch " << c_.batch << " tokens " << c_.tokens << " features " << c_.features << " columns " << c_.columns
         << " groups " << c_.Groups() << " multiprocessors " << c_.multiprocessors
         << (c_.w_scales_by_column ? " scales of w by column" : "");
    return text.str();
  }

  Memory MakeMemory() const override {
    Memory memory;
    std::mt19937 random(1);
    AddTokens(random, memory);
    std::vector<uint8_t> w(c_.sizes.size() * c_.columns * c_.features);
    std::vector<float> w_scales(c_.sizes.size() * c_.Blocks() * c_.ColumnBlocks());
    FillFp8Operand(c_.numbers, random, w.size(), w.data());
    for (size_t i = 0; i < w_scales.size(); ++i) w_scales[i] = RandomScale(c_.numbers, random, i);
    AddInput(memory, "w", w);
    AddInput(memory, "w_scales", w_scales);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "y", c_.batch * c_.tokens * c_.columns * 2);
    return memory;
  }

  bool IsExact() const override { return false; }
  // Against plain sums in double precision.
  std::string Compare(const Memory& expected, const Memory& got) const override {
    const std::string guard = FindBrokenGuard(got);
    if (!guard.empty()) return guard;
    return CompareProduct(c_.numbers, true, MakeSums(expected), got[kY]);
  }

#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& a, Stream stream) const override {
    return MatmulOnCuda(
        {a[kX], reinterpret_cast<const float*>(a[kXScales]), a[kW], reinterpret_cast<const float*>(a[kWScales]),
         reinterpret_cast<const int32_t*>(a[kGroupSizes]), a[kY], c_.w_scales_by_column, c_.batch, c_.Groups(),
         c_.tokens, c_.features, c_.columns, c_.multiprocessors},
        stream);
  }
#endif

 private:
  enum { kX, kXScales, kW, kWScales, kGroupSizes, kY };

  // Rows of no group hold NaN, which no result may show.
  void AddTokens(std::mt19937& random, Memory& memory) const {
    std::vector<uint8_t> values(c_.batch * c_.tokens * c_.features, 0x7F);
    std::vector<float> scales(c_.batch * c_.Blocks() * c_.tokens, NAN);
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      const int64_t used = RowsTaken(c_.Placed(batch));
      FillFp8Operand(c_.numbers, random, used * c_.features, values.data() + batch * c_.tokens * c_.features);
      for (int64_t block = 0; block < c_.Blocks(); ++block) {
        float* const row_scales = scales.data() + (batch * c_.Blocks() + block) * c_.tokens;
        for (int64_t t = 0; t < used; ++t) row_scales[t] = RandomScale(c_.numbers, random, t);
      }
    }
    AddInput(memory, "x", values);
    AddInput(memory, "x_scales", scales);
  }

  std::vector<ProductSum> MakeSums(const Memory& memory) const {
    const auto* x_scales = reinterpret_cast<const float*>(memory[kXScales].bytes.data());
    const auto* w_scales = reinterpret_cast<const float*>(memory[kWScales].bytes.data());
    const int64_t block_step = c_.w_scales_by_column ? 1 : c_.ColumnBlocks();
    const int64_t column_step = c_.w_scales_by_column ? c_.Blocks() : 1;
    std::vector<ProductSum> sums(c_.batch * c_.tokens * c_.columns);
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      const std::vector<PlacedGroup> placed = c_.Placed(batch);
      for (int64_t group = 0; group < c_.Groups(); ++group) {
        const int64_t matrix = batch * c_.Groups() + group;
        for (int64_t i = 0; i < placed[group].rows * c_.columns; ++i) {
          const int64_t t = placed[group].first_row + i / c_.columns, n = i % c_.columns;
          const uint8_t* const x = memory[kX].bytes.data() + (batch * c_.tokens + t) * c_.features;
          const uint8_t* const w = memory[kW].bytes.data() + (matrix * c_.columns + n) * c_.features;
          for (int64_t block = 0; block < c_.Blocks(); ++block) {
            const int64_t first = block * kBlock, count = std::min<int64_t>(kBlock, c_.features - first);
            const int64_t w_block = block * block_step + n / kBlock * column_step;
            const float scale = x_scales[(batch * c_.Blocks() + block) * c_.tokens + t] *
                                w_scales[matrix * c_.Blocks() * c_.ColumnBlocks() + w_block];
            sums[(batch * c_.tokens + t) * c_.columns + n].Add(x + first, w + first, count, scale);
          }
        }
      }
    }
    return sums;
  }

  const MatmulCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

Tests NamedTests() {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  Sizes many(1024, 0);
  for (int i = 0; i < 1024; i += 7) many[i] = i % 23;
  const Sizes around = {63, 64, 65, 127, 0, 128, 129, 191, 192, 193, 1, 257};
  Tests tests;
  for (MatmulCase c : std::vector<MatmulCase>{
           {"one tile", 192, 128, 128, {192}},
           {"one tile of many blocks", 192, 2048, 128, {192}},
           {"smallest", 1, 16, 8, {1}},
           {"partial tiles", 700, 272, 200, {333, 0, 250, 100}},
           {"odd number of column tiles", 300, 256, 392, {100, 200}},
           {"uneven rounds of stages", 500, 656, 136, {200, 37, 263}},
           {"pieces that reach into the next group", 1410, 144, 264, around},
           {"tail of no group", 700, 272, 136, {100, 0, 201}},
           {"nothing but empty groups", 500, 144, 136, {0, 0, 0}},
           {"no tokens", 0, 64, 64, {0, 5, -1}},
           {"no groups", 200, 64, 64, {}},
           {"no features", 200, 0, 64, {100, 50}},
           {"no columns", 200, 64, 0, {100, 50}},
           {"broken sizes", 700, 144, 136, {-5, 200, kLeast, 300, 127, kMost, kMost, 128}},
           {"sizes that overflow", 100, 64, 72, Sizes(300, kMost)},
           {"many groups", 1700, 48, 40, many},
           {"several lists of tiles", 3000, 16, 1288, {900, 1, 2099}, 1, Numbers::kNormal, 2},
           {"batches", 400, 272, 136, {128, 200, 0, 256, 10, 134}, 2},
           {"wild scales", 600, 400, 264, {301, 128, 171}, 1, Numbers::kWildScales},
           {"exact sums", 1410, 656, 264, around, 1, Numbers::kExact},
           {"few multiprocessors", 1410, 272, 392, around, 1, Numbers::kExact, 6},
       }) {
    for (const bool by_column : {false, true}) {
      c.w_scales_by_column = by_column;
      tests.push_back(std::make_unique<MatmulTest>(c));
    }
  }
  return tests;
}

Tests ReplayedTests() {
  Tests tests;
  for (const Sizes& sizes :
       std::vector<Sizes>{{0, 900, 0, 0}, {128, 201, 55, 384}, {300, 0, 128, 0}, {0, 0, 0, 0}, {1, 1, 1, 897}}) {
    tests.push_back(std::make_unique<MatmulTest>(MatmulCase{"replay", 900, 272, 136, sizes}));
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

struct Shape {
  Dims batch;
  int64_t tokens, features, columns, groups;
  bool transpose_w;
  FrameAttribute multiprocessors;
};

Frame MakeFrame(const Shape& s) {
  const Wide blocks = Blocks(s.features), column_blocks = Blocks(s.columns);
  Frame frame;
  Add(frame.operands, kE4m3, s.batch, {s.tokens, s.features});
  Add(frame.operands, kF32, s.batch, {s.tokens, blocks});
  Add(frame.operands, kE4m3, s.batch, {s.groups, s.columns, s.features});
  Add(frame.operands, kF32, s.batch,
      {s.groups, s.transpose_w ? column_blocks : blocks, s.transpose_w ? blocks : column_blocks});
  Add(frame.operands, kS32, s.batch, {s.groups});
  Add(frame.results, kBf16, s.batch, {s.tokens, s.columns});
  frame.attributes = {s.multiprocessors, Flag("transpose_w", s.transpose_w)};
  return frame;
}

Frame MakeMatmulCall(Bytes& bytes) {
  Shape s;
  s.batch = SmallBatch(bytes);
  s.tokens = SmallSize(bytes);
  s.features = SmallSize(bytes) / 16 * bytes.Pick({16, 16, 16, 8});
  s.columns = SmallSize(bytes) / 8 * bytes.Pick({8, 8, 8, 4});
  s.groups = bytes.Next() % 16 ? bytes.Next() % 6 : kMostProductGroups + bytes.Next() % 2;
  s.transpose_w = bytes.Flag();
  s.multiprocessors = Multiprocessors(bytes);
  if (bytes.Next() % 8 == 0) {
    s.batch.resize(1, 1);
    MakeHuge(bytes, {&s.batch[0], &s.tokens, &s.features, &s.columns});
  }
  return MakeFrame(s);
}

bool IsRightCall(const Frame& frame) {
  if (frame.operands.size() != 5 || frame.results.size() != 1 || frame.operands[2].dims.size() < 3) return false;
  if (!HasMultiprocessors(frame) || !HasFlags(frame, {"transpose_w"}, 1)) return false;
  const Dims &x = frame.operands[0].dims, &w = frame.operands[2].dims;
  const Shape s = {
      Dims(x.begin(), x.end() - 2),   x[x.size() - 2],    x.back(), w[w.size() - 2], Last(frame.operands[4]),
      frame.attributes[1].value != 0, frame.attributes[0]};
  return SameBuffers(frame, MakeFrame(s)) && !IsTooLarge(w) && !IsTooLarge(frame.results[0].dims) &&
         s.tokens <= kMostTokens && s.features <= kMostProductFeatures && s.columns <= kMostProductFeatures &&
         s.features % 16 == 0 && s.columns % 8 == 0 && s.groups <= kMostProductGroups;
}

bool IsAlignedCall(const Frame& frame) {
  return IsAligned(frame.operands[0]) && IsAligned(frame.operands[2]) && IsAligned(frame.results[0]);
}

#endif

#ifdef JAX_TSQ_CUDA

// Forward, or the input gradient, which sums over features of dy.
Prepared Prepare(const ProductSize& size, const Sizes& sizes, bool input_gradient, Arena& arena) {
  MatmulProblem problem = {};
  problem.features = input_gradient ? size.dy_features : size.x_features;
  problem.columns = input_gradient ? size.x_features : size.dy_features;
  const int64_t blocks = CeilDiv(problem.features, kBlock), column_blocks = CeilDiv(problem.columns, kBlock);
  problem.x = arena.Fp8(size.tokens * problem.features);
  problem.x_scales = arena.Scales(size.tokens * blocks);
  problem.w = arena.Fp8(size.groups * problem.columns * problem.features);
  problem.w_scales = arena.Scales(size.groups * blocks * column_blocks);
  problem.group_sizes = arena.Upload(sizes);
  problem.y = arena.AllocateBytes(size.tokens * problem.columns * 2);
  problem.w_scales_by_column = input_gradient;
  problem.batch = 1;
  problem.groups = size.groups;
  problem.tokens = size.tokens;
  const auto element = [problem, sizes, blocks, column_blocks](std::mt19937& random) -> Element {
    const std::vector<PlacedGroup> placed = PlaceGroups(sizes.data(), problem.groups, problem.tokens, false);
    const int64_t t = random() % RowsTaken(placed), n = random() % problem.columns;
    int64_t group = 0;
    while (t >= placed[group].first_row + placed[group].rows) ++group;
    const float* const w_scales = problem.w_scales + group * blocks * column_blocks;
    const bool by_column = problem.w_scales_by_column;
    return {problem.x + t * problem.features,
            {problem.x_scales + t, problem.tokens},
            problem.w + (group * problem.columns + n) * problem.features,
            {w_scales + n / kBlock * (by_column ? blocks : 1), by_column ? 1 : column_blocks},
            problem.features,
            static_cast<const uint8_t*>(problem.y) + (t * problem.columns + n) * 2,
            true};
  };
  return {[problem] { return MatmulOnCuda(problem, nullptr); }, [element] { return RelativeError(element); }};
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  for (const ProductSize& size : ProductSizes()) {
    const Sizes sizes = SpreadTokens(size.tokens, size.groups, 1);
    for (const bool input_gradient : {false, true}) {
      benchmarks.push_back({std::string(input_gradient ? "matmul-dx-" : "matmul-y-") + size.Name(), 0,
                            2.0 * size.tokens * size.x_features * size.dy_features,
                            [=](Arena& arena) { return Prepare(size, sizes, input_gradient, arena); }});
    }
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "matmul";
  operation.on_cpu = false;
  operation.needs_sm90 = true;
  operation.named = NamedTests;
  operation.replayed = ReplayedTests;
#ifdef JAX_TSQ_CUDA
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {MatmulCuda, MakeMatmulCall, IsRightCall, IsAlignedCall, ExpectSum};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
