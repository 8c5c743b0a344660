// quantize_rows in the harness.

#include "rows/rows.h"

#include <algorithm>
#include <memory>

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
XLA_FFI_DECLARE_HANDLER_SYMBOL(RowsCpu);
#endif

namespace jax_tsq::harness {
namespace {

struct RowsCase : GroupCase {
  bool all_rows = false;  // without sizes
};

void Solve(const RowsProblem& p) {
  const Input& input = p.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    const int64_t rows =
        p.group_sizes == nullptr
            ? input.tokens
            : RowsTaken(PlaceGroups(p.group_sizes + batch * p.groups, p.groups, input.tokens, p.aligned));
    QuantizeRows(input, batch, rows, p.values + batch * input.tokens * input.features,
                 p.dequant_scales + batch * CeilDiv(input.features, kBlock) * input.tokens);
  }
}

class RowsTest : public Test {
 public:
  explicit RowsTest(RowsCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override { return harness::Describe(c_) + (c_.all_rows ? " all rows" : ""); }

  Memory MakeMemory() const override {
    Memory memory;
    const int64_t blocks = CeilDiv(c_.features, kBlock);
    AddInputArrays(c_, c_.all_rows ? std::vector<int64_t>(c_.batch, c_.tokens) : RowsInGroups(c_), memory);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "values", c_.batch * c_.tokens * c_.features, c_.out_offset);
    AddOutput(memory, "dequant_scales", c_.batch * blocks * c_.tokens * sizeof(float),
              c_.scales_offset * sizeof(float));
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    RowsOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return RowsOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum { kGroupSizes = kInputArrays, kValues, kDequantScales };

  // As the handler: without groups an address that is not null says that there are sizes, and nobody reads there.
  const int32_t* GroupSizes(const Addresses& addresses) const {
    static constexpr int32_t kEmpty = 0;
    if (c_.all_rows) return nullptr;
    return c_.groups == 0 ? &kEmpty : reinterpret_cast<const int32_t*>(addresses[kGroupSizes]);
  }

  RowsProblem Problem(const Addresses& addresses) const {
    return {MakeInput(c_, addresses),    GroupSizes(addresses),
            c_.all_rows ? 0 : c_.groups, c_.aligned,
            addresses[kValues],          reinterpret_cast<float*>(addresses[kDequantScales])};
  }

  const RowsCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

Tests NamedTests() {
  Tests tests;
  std::vector<GroupCase> named = NamedGroupCases();
  named.push_back(MakeGroupCase("long rows", 35, {10, 20}, 16500));
  for (const GroupCase& group_case : named) {
    for (const int flags : {0, 1, 2}) {
      RowsCase c = {group_case, flags == 2};
      c.aligned = flags == 1;
      c.along_rows = true;
      ForEachVariant(c, [&](const RowsCase& variant) { tests.push_back(std::make_unique<RowsTest>(variant)); },
                     {InputType::kBf16});
    }
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  RowsCase c = {RandomGroupCase(random), random() % 3 == 0};
  c.type = InputType::kBf16;
  c.along_rows = random() % 4 != 0;
  return std::make_unique<RowsTest>(c);
}

Tests ReplayedTests() {
  Tests tests;
  for (const GroupCase& c : ReplayedGroupCases()) tests.push_back(std::make_unique<RowsTest>(RowsCase{c}));
  return tests;
}

Tests PairTests() {
  constexpr int64_t kTokens = 4096;
  Tests tests;
  for (int64_t first = 0; first < CountPairColumns(); first += kTokens) {
    for (const bool pow_2_scales : {false, true}) {
      RowsCase c = {MakeGroupCase("pairs", kTokens, {}, kBlock), true};
      c.data = Data::kPairs;
      c.along_rows = true;
      c.first_column = first;
      c.pow_2_scales = pow_2_scales;
      tests.push_back(std::make_unique<RowsTest>(c));
    }
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const InputShape& shape, bool has_sizes, int64_t groups) {
  Frame frame;
  std::vector<FrameBuffer> sizes;
  if (has_sizes) Add(sizes, kS32, shape.batch, {groups});
  AddInput(shape, sizes, frame.operands);
  Add(frame.results, kE4m3, shape.batch, {shape.tokens, shape.features});
  Add(frame.results, kF32, shape.batch, {shape.tokens, Blocks(shape.features)});
  return frame;
}

Frame MakeRowsCall(Bytes& bytes) {
  int64_t groups;
  InputShape shape = MakeGroupShape(bytes, groups);
  shape.fp8 = bytes.Next() % 16 == 0;  // which is wrong
  Frame frame = MakeFrame(shape, bytes.Flag(), groups);
  frame.attributes = {Flag("aligned", bytes.Flag()), Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlags(frame, {"aligned", "pow_2_scales"})) return false;
  const InputShape shape = InputShapeOf(frame);
  const bool has_sizes = frame.operands.size() > 1;
  const int64_t groups = has_sizes ? Last(frame.operands[1]) : 0;
  return !shape.fp8 && groups >= 0 && SameBuffers(frame, MakeFrame(shape, has_sizes, groups));
}

void ExpectCall(const Frame& frame) {
  RowsProblem problem = {};
  problem.input = InputOf(frame, frame.attributes[1].value);
  if (frame.operands.size() > 1) {
    static constexpr int32_t kEmpty = 0;  // an empty array may have no address
    problem.groups = frame.operands[1].dims.back();
    problem.group_sizes = problem.groups == 0 ? &kEmpty : static_cast<const int32_t*>(frame.operands[1].data);
  }
  problem.aligned = frame.attributes[0].value;
  problem.values = static_cast<uint8_t*>(frame.results[0].data);
  problem.dequant_scales = static_cast<float*>(frame.results[1].data);
  Solve(problem);
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  Arena arena;
  const LargeInput large(arena);
  const int64_t features = large.input.features, blocks = CeilDiv(features, kBlock), tokens = large.input.tokens;
  std::vector<uint8_t> values(kBlock * features);
  std::vector<float> dequant_scales(blocks * kBlock);
  QuantizeRows(large.block, 0, kBlock, values.data(), dequant_scales.data());
  const RowsProblem problem = {large.input,
                               nullptr,
                               0,
                               false,
                               arena.Allocate<uint8_t>(tokens * features),
                               arena.Allocate<float>(blocks * tokens)};
  if (const char* error = RowsOnCuda(problem, nullptr)) return error;
  const std::string difference = CompareRepeated(problem.values, features, values, features, kBlock * features);
  if (!difference.empty()) return difference;
  return CompareRepeated(problem.dequant_scales, tokens, dequant_scales, kBlock, kBlock);
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  const auto add = [&](const std::string& kind, const InputSize& size, int64_t used) {
    const double values = static_cast<double>(size.tokens) * size.features;
    const double scales = static_cast<double>(size.tokens) * CeilDiv(size.features, kBlock) * sizeof(float);
    const auto prepare = [size, used](Arena& arena) {
      const bool all_rows = used == size.tokens;
      const RowsProblem problem = {MakeBenchInput(size, arena),
                                   all_rows ? nullptr : arena.Upload(SpreadTokens(used, size.experts, 1)),
                                   all_rows ? 0 : size.experts,
                                   false,
                                   arena.Allocate<uint8_t>(size.tokens * size.features),
                                   arena.Allocate<float>(CeilDiv(size.features, kBlock) * size.tokens)};
      return Prepared{[problem] { return RowsOnCuda(problem, nullptr); }};
    };
    benchmarks.push_back({"rows-" + size.Name(kind), BytesRead(size, used) + values + scales, 0, prepare});
  };
  for (const InputSize& size : LayerSizes()) {
    add("", size, size.tokens);
    add("-quarter", size, size.tokens / 4);
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "rows";
  operation.named = NamedTests;
  operation.random = RandomTest;
  operation.replayed = ReplayedTests;
  operation.pairs = PairTests;
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {RowsCpu, MakeRowsCall, IsRightCall, AnyAlignment, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
