// ragged_transpose_quant in the harness.

#include "ragged/ragged.h"

#include <algorithm>
#include <memory>

#include "core/groups.h"
#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/groups.h"
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

struct RaggedCase : GroupCase {
  bool flat = false;
};

void Solve(const RaggedProblem& p) {
  QuantizeGroups(p.input, p.group_sizes, p.groups, p.aligned,
                 {p.padded_tokens, p.flat, p.values, p.dequant_scales, p.padded_sizes});
}

class RaggedTest : public Test {
 public:
  explicit RaggedTest(RaggedCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override { return harness::Describe(c_) + (c_.flat ? " flat" : ""); }

  Memory MakeMemory() const override {
    Memory memory;
    AddInputArrays(c_, RowsInGroups(c_), memory);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "values", c_.batch * c_.features * c_.Padded(), c_.out_offset);
    AddOutput(memory, "dequant_scales", c_.batch * c_.Padded() / kBlock * c_.features * sizeof(float),
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

  RaggedProblem Problem(const Addresses& addresses) const {
    return {MakeInput(c_, addresses),
            reinterpret_cast<const int32_t*>(addresses[kGroupSizes]),
            c_.groups,
            c_.Padded(),
            c_.aligned,
            c_.flat,
            addresses[kValues],
            reinterpret_cast<float*>(addresses[kDequantScales]),
            reinterpret_cast<int32_t*>(addresses[kPaddedSizes])};
  }

  const RaggedCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

Tests NamedTests() {
  Tests tests;
  for (const GroupCase& named : NamedGroupCases()) {
    for (const int flags : {0, 1, 2, 3}) {
      RaggedCase c = {named, (flags & 2) != 0};
      c.aligned = flags & 1;
      c.extra_blocks = flags;
      ForEachVariant(c, [&](const RaggedCase& variant) { tests.push_back(std::make_unique<RaggedTest>(variant)); });
    }
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  const GroupCase c = RandomGroupCase(random);
  return std::make_unique<RaggedTest>(RaggedCase{c, random() % 2 != 0});
}

Tests ReplayedTests() {
  Tests tests;
  for (const GroupCase& c : ReplayedGroupCases()) tests.push_back(std::make_unique<RaggedTest>(RaggedCase{c}));
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const InputShape& shape, int64_t groups, bool aligned, bool flat) {
  const Wide padded = PaddedSize(shape, groups, aligned);
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
  int64_t groups;
  const InputShape shape = MakeGroupShape(bytes, groups);
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
  return CanPad(shape, groups, aligned) && SameBuffers(frame, MakeFrame(shape, groups, aligned, flat));
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
  return CheckLargeColumns([](const Input& input, uint8_t* out, float* dequant_scales, Arena& arena) {
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
