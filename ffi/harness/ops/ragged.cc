// ragged_transpose_quant in the harness.

#include "ragged/ragged.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/groups.h"
#include "core/limits.h"
#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/input.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include "harness/ops/input_cuda.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedCpu);
#endif

namespace jax_tsq::harness {
namespace {

using Sizes = std::vector<int32_t>;
constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();

struct RaggedCase : InputCase {
  int64_t groups = 0;
  Sizes sizes;  // [batch, groups]
  bool aligned = false;
  bool flat = false;
  int64_t extra_blocks = 0;  // in the padded result
};

void Solve(const RaggedProblem& problem) {
  const Input& input = problem.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    float* dequant_scales = problem.dequant_scales + batch * problem.padded_tokens / kBlock * input.features;
    std::fill_n(values, input.features * problem.padded_tokens, uint8_t{0});
    std::fill_n(dequant_scales, problem.padded_tokens / kBlock * input.features, 1.0f);
    int32_t* padded_size = problem.padded_sizes + batch * problem.groups;
    for (const PlacedGroup& group :
         PlaceGroups(problem.group_sizes + batch * problem.groups, problem.groups, input.tokens, problem.aligned)) {
      const int64_t pitch = problem.flat ? group.padded : problem.padded_tokens;
      uint8_t* out = values + (problem.flat ? input.features * group.first_padded : group.first_padded);
      for (int64_t token = 0; token < group.rows; token += kBlock) {
        QuantizeColumns(input, batch * input.tokens + group.first_row + token,
                        std::min<int64_t>(kBlock, group.rows - token), kBlock, pitch, out + token,
                        dequant_scales + (group.first_padded + token) / kBlock * input.features);
      }
      *padded_size++ = static_cast<int32_t>(group.padded);
    }
  }
}

class RaggedTest : public Test {
 public:
  explicit RaggedTest(RaggedCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override {
    return harness::Describe(c_) + (c_.aligned ? " aligned" : "") + (c_.flat ? " flat" : "") + " extra blocks " +
           std::to_string(c_.extra_blocks) + " sizes" + harness::Describe(c_.sizes);
  }

  Memory MakeMemory() const override {
    Memory memory;
    std::vector<int64_t> rows;
    for (int64_t batch = 0; batch < c_.batch; ++batch) {
      rows.push_back(RowsTaken(PlaceGroups(c_.sizes.data() + batch * c_.groups, c_.groups, c_.tokens, c_.aligned)));
    }
    AddInputArrays(c_, rows, memory);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "values", c_.batch * c_.features * Padded(), c_.out_offset);
    AddOutput(memory, "dequant_scales", c_.batch * Padded() / kBlock * c_.features * sizeof(float),
              c_.scales_offset * sizeof(float));
    AddOutput(memory, "padded_sizes", c_.sizes.size() * sizeof(int32_t));
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    RaggedOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return RaggedOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum { kGroupSizes = kInputArrays, kValues, kDequantScales, kPaddedSizes };

  int64_t Padded() const { return PaddedTokens(c_.tokens, c_.groups, c_.aligned) + c_.extra_blocks * kBlock; }

  RaggedProblem Problem(const Addresses& addresses) const {
    return {MakeInput(c_, addresses),
            reinterpret_cast<const int32_t*>(addresses[kGroupSizes]),
            c_.groups,
            Padded(),
            c_.aligned,
            c_.flat,
            addresses[kValues],
            reinterpret_cast<float*>(addresses[kDequantScales]),
            reinterpret_cast<int32_t*>(addresses[kPaddedSizes])};
  }

  const RaggedCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

RaggedCase MakeCase(std::string name, int64_t tokens, const Sizes& sizes, int64_t features, int64_t batch = 1) {
  RaggedCase c;
  c.name = std::move(name);
  c.batch = batch;
  c.tokens = tokens;
  c.features = features;
  c.groups = static_cast<int64_t>(sizes.size()) / std::max<int64_t>(batch, 1);
  c.sizes = sizes;
  return c;
}

Tests NamedTests() {
  Sizes last(1000, 0);
  last[999] = 130;
  Sizes sparse(3 * 700, 0);
  sparse[5] = sparse[699] = sparse[1000] = 90;
  Tests tests;
  for (RaggedCase c : {
           MakeCase("no tokens", 0, {0, 3, -1}, 24),
           MakeCase("no groups", 200, {}, 24),
           MakeCase("no features", 200, {100, 100}, 0),
           MakeCase("no batch", 200, {}, 24, 0),
           MakeCase("one group", 384, {384}, 200),
           MakeCase("one long group", 1000, {900}, 136),
           MakeCase("whole blocks", 640, {128, 0, 384, 128}, 136),
           MakeCase("a quarter full", 1024, {100, 0, 156}, 65),
           MakeCase("negative sizes", 300, {-5, 100, kLeast, 100, -1}, 71),
           MakeCase("sizes past the end", 300, {100, kMost, 100, kMost}, 72),
           MakeCase("huge sizes that overflow", 256, Sizes(300, kMost), 9),
           MakeCase("one row each", 300, Sizes(300, 1), 16),
           MakeCase("the last of many groups", 130, last, 24),
           MakeCase("two batches", 260, {100, 100, 60, 0, 7, 300}, 129, 2),
           MakeCase("many groups in batches", 200, sparse, 8, 3),
       }) {
    for (const int flags : {0, 1, 2, 3}) {
      c.aligned = flags & 1;
      c.flat = flags & 2;
      c.extra_blocks = flags;
      ForEachVariant(c, [&](const RaggedCase& variant) { tests.push_back(std::make_unique<RaggedTest>(variant)); });
    }
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  RaggedCase c;
  MakeRandom(random, c);
  c.batch = random() % 4 ? 1 : Uniform(random, 2, 3);
  const std::vector<int64_t> counts = RandomCounts(random);
  c.tokens = Sum(counts);
  c.groups = static_cast<int64_t>(counts.size());
  c.aligned = random() % 3 == 0;
  c.flat = random() % 2;
  c.extra_blocks = random() % 3 ? 0 : Uniform(random, 1, 3);
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    c.sizes.insert(c.sizes.end(), counts.begin(), counts.end());
    if (random() % 2) std::shuffle(c.sizes.end() - c.groups, c.sizes.end(), random);
    int32_t* sizes = c.sizes.data() + batch * c.groups;
    if (random() % 4 == 0) sizes[random() % c.groups] = static_cast<int32_t>(random());
    if (random() % 4 == 0) sizes[random() % c.groups] = 0;
  }
  if (random() % 3 == 0) c.tokens += Uniform(random, 0, 400);
  return std::make_unique<RaggedTest>(c);
}

Tests ReplayedTests() {
  Tests tests;
  for (const Sizes& sizes : std::vector<Sizes>{{0, 700, 0, 0}, {100, 200, 300, 100}, {-1, 5, kMost, 0}, {0, 0, 0, 0}}) {
    tests.push_back(std::make_unique<RaggedTest>(MakeCase("replay", 700, sizes, 200)));
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Wide Padded(const InputShape& shape, int64_t groups, bool aligned) {
  if (aligned) return Blocks(shape.tokens) * 128;
  return (shape.tokens + Wide{127} * std::min(groups, shape.tokens)) / 128 * 128;
}

Frame MakeFrame(const InputShape& shape, int64_t groups, bool aligned, bool flat) {
  const Wide padded = Padded(shape, groups, aligned);
  Frame frame;
  std::vector<FrameBuffer> sizes;
  Add(sizes, kS32, shape.batch, {groups});
  AddInput(shape, sizes, frame.operands);
  if (flat) {
    Add(frame.results, kE4m3, shape.batch, {shape.features * padded});
  } else {
    Add(frame.results, kE4m3, shape.batch, {shape.features, padded});
  }
  Add(frame.results, kF32, shape.batch, {padded / 128, shape.features});
  Add(frame.results, kS32, shape.batch, {groups});
  return frame;
}

Frame MakeRaggedCall(Bytes& bytes) {
  std::vector<int64_t> counts;
  InputShape shape = MakeInputShape(bytes, counts);
  shape.tokens += bytes.Next() % 8 ? 0 : 150;
  auto groups = static_cast<int64_t>(counts.size());
  if (MakeHugeInput(bytes, shape) && bytes.Flag()) groups = 0;
  const bool aligned = bytes.Flag(), flat = bytes.Flag();
  Frame frame = MakeFrame(shape, groups, aligned, flat);
  frame.attributes = {Flag("aligned", aligned), Flag("flat", flat), Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlags(frame, {"aligned", "flat", "pow_2_scales"}) || frame.operands.size() < 2) return false;
  const bool aligned = frame.attributes[0].value, flat = frame.attributes[1].value;
  const InputShape shape = InputShapeOf(frame);
  const int64_t groups = Last(frame.operands[1]);
  if (groups < 0) return false;
  const Wide padded = Padded(shape, groups, aligned);
  return padded <= kMostTokens && padded * shape.features <= kMostElements &&
         SameBuffers(frame, MakeFrame(shape, groups, aligned, flat));
}

void ExpectCall(const Frame& frame) {
  RaggedProblem problem = {};
  problem.input = InputOf(frame, frame.attributes[2].value);
  problem.group_sizes = static_cast<const int32_t*>(frame.operands[1].data);
  problem.groups = frame.operands[1].dims.back();
  problem.padded_tokens = frame.results[1].dims[frame.results[1].dims.size() - 2] * 128;
  problem.aligned = frame.attributes[0].value;
  problem.flat = frame.attributes[1].value;
  problem.values = static_cast<uint8_t*>(frame.results[0].data);
  problem.dequant_scales = static_cast<float*>(frame.results[1].data);
  problem.padded_sizes = static_cast<int32_t*>(frame.results[2].data);
  Solve(problem);
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  return CheckLargeInput([](const Input& input, uint8_t* out, float* dequant_scales, Arena& arena) {
    int32_t* sizes = arena.Upload(Sizes{static_cast<int32_t>(input.tokens), 0});
    return RaggedOnCuda({input, sizes, 1, input.tokens, true, false, out, dequant_scales, sizes + 1}, nullptr);
  });
}

Prepared Prepare(const InputSize& size, const Sizes& counts, bool aligned, Arena& arena) {
  const int64_t padded = PaddedTokens(size.tokens, size.experts, aligned);
  Sizes sizes;
  for (int64_t batch = 0; batch < size.batch; ++batch) sizes.insert(sizes.end(), counts.begin(), counts.end());
  const RaggedProblem problem = {MakeBenchInput(size, arena),
                                 arena.Upload(sizes),
                                 size.experts,
                                 padded,
                                 aligned,
                                 false,
                                 arena.Allocate<uint8_t>(size.batch * size.features * padded),
                                 arena.Allocate<float>(size.batch * padded / kBlock * size.features),
                                 arena.Allocate<int32_t>(sizes.size())};
  return {[problem] { return RaggedOnCuda(problem, nullptr); }};
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  const auto add = [&](const std::string& kind, const InputSize& size, int64_t multiple, int64_t used) {
    const bool aligned = multiple == kBlock;
    const Sizes counts = SpreadTokens(used, size.experts, multiple);
    const double padded = PaddedTokens(size.tokens, size.experts, aligned);
    const double written = padded * size.features + padded / kBlock * size.features * 4;
    benchmarks.push_back({"ragged-" + size.Name(kind), BytesRead(size, used) + size.batch * written, 0,
                          [=](Arena& arena) { return Prepare(size, counts, aligned, arena); }});
  };
  for (const InputSize& size : BenchSizes()) add("", size, kBlock, size.tokens);
  for (const InputSize& size : BenchSizes()) add("-random", size, 1, size.tokens);
  for (const InputSize& size : BenchSizes()) add("-quarter", size, kBlock, size.tokens / 4);
  for (const InputSize& size : BenchSizes()) add("-quarter-random", size, 1, size.tokens / 4);
  InputSize size = BenchSizes()[0];
  size.type = InputType::kFp8;
  add("", size, kBlock, size.tokens);
  size = BenchSizes()[0];
  size.features -= 7;
  add("-k7", size, kBlock, size.tokens);
  add("-vmap8", {8192, 4096, 16, InputType::kBf16, 8}, kBlock, 8192);
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "ragged";
  operation.named = NamedTests;
  operation.random = RandomTest;
  operation.replayed = ReplayedTests;
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {RaggedCpu, MakeRaggedCall, IsRightCall, AnyAlignment, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
