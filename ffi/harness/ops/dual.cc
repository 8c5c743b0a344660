// ragged_quantize in the harness.

#include "dual/dual.h"

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
XLA_FFI_DECLARE_HANDLER_SYMBOL(DualCpu);
#endif

namespace jax_tsq::harness {
namespace {

void Solve(const DualProblem& p) {
  const Input& input = p.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    const int64_t rows = RowsTaken(PlaceGroups(p.group_sizes + batch * p.groups, p.groups, input.tokens, p.aligned));
    QuantizeRows(input, batch, rows, p.row_values + batch * input.tokens * input.features,
                 p.row_dequant_scales + batch * CeilDiv(input.features, kBlock) * input.tokens);
  }
  QuantizeGroups(input, p.group_sizes, p.groups, p.aligned,
                 {p.padded_tokens, false, p.column_values, p.column_dequant_scales, p.padded_sizes});
}

class DualTest : public Test {
 public:
  explicit DualTest(GroupCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override { return harness::Describe(c_); }

  Memory MakeMemory() const override {
    Memory memory;
    const int64_t padded = c_.Padded();
    const size_t scales_offset = c_.scales_offset * sizeof(float);
    AddInputArrays(c_, RowsInGroups(c_), memory);
    AddInput(memory, "group_sizes", c_.sizes);
    AddOutput(memory, "row_values", c_.batch * c_.tokens * c_.features, c_.out_offset);
    AddOutput(memory, "row_dequant_scales", c_.batch * CeilDiv(c_.features, kBlock) * c_.tokens * sizeof(float),
              scales_offset);
    AddOutput(memory, "column_values", c_.batch * c_.features * padded, c_.out_offset);
    AddOutput(memory, "column_dequant_scales", c_.batch * padded / kBlock * c_.features * sizeof(float), scales_offset);
    AddOutput(memory, "padded_sizes", c_.sizes.size() * sizeof(int32_t));
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    DualOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return DualOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum {
    kGroupSizes = kInputArrays,
    kRowValues,
    kRowDequantScales,
    kColumnValues,
    kColumnDequantScales,
    kPaddedSizes,
  };

  DualProblem Problem(const Addresses& addresses) const {
    return {MakeInput(c_, addresses),
            reinterpret_cast<const int32_t*>(addresses[kGroupSizes]),
            c_.groups,
            c_.Padded(),
            c_.aligned,
            addresses[kRowValues],
            reinterpret_cast<float*>(addresses[kRowDequantScales]),
            addresses[kColumnValues],
            reinterpret_cast<float*>(addresses[kColumnDequantScales]),
            reinterpret_cast<int32_t*>(addresses[kPaddedSizes])};
  }

  const GroupCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

Tests NamedTests() {
  Tests tests;
  for (GroupCase c : NamedGroupCases()) {
    for (const int flags : {0, 1, 2, 3}) {
      c.aligned = flags & 1;
      c.along_rows = flags & 2;
      c.extra_blocks = flags;
      ForEachVariant(c, [&](const GroupCase& variant) { tests.push_back(std::make_unique<DualTest>(variant)); },
                     {InputType::kBf16});
    }
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  GroupCase c = RandomGroupCase(random);
  c.type = InputType::kBf16;
  c.along_rows = random() % 2;
  return std::make_unique<DualTest>(c);
}

Tests ReplayedTests() {
  Tests tests;
  for (const GroupCase& c : ReplayedGroupCases()) tests.push_back(std::make_unique<DualTest>(c));
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const InputShape& shape, int64_t groups, bool aligned) {
  const Wide padded = PaddedSize(shape, groups, aligned);
  Frame frame;
  std::vector<FrameBuffer> sizes;
  Add(sizes, kS32, shape.batch, {groups});
  AddInput(shape, sizes, frame.operands);
  Add(frame.results, kE4m3, shape.batch, {shape.tokens, shape.features});
  Add(frame.results, kF32, shape.batch, {shape.tokens, Blocks(shape.features)});
  Add(frame.results, kE4m3, shape.batch, {shape.features, padded});
  Add(frame.results, kF32, shape.batch, {padded / 128, shape.features});
  Add(frame.results, kS32, shape.batch, {groups});
  return frame;
}

Frame MakeDualCall(Bytes& bytes) {
  int64_t groups;
  InputShape shape = MakeGroupShape(bytes, groups);
  shape.fp8 = bytes.Next() % 16 == 0;  // which is wrong
  const bool aligned = bytes.Flag();
  Frame frame = MakeFrame(shape, groups, aligned);
  frame.attributes = {Flag("aligned", aligned), Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlags(frame, {"aligned", "pow_2_scales"}) || frame.operands.size() < 2) return false;
  const bool aligned = frame.attributes[0].value;
  const InputShape shape = InputShapeOf(frame);
  const int64_t groups = Last(frame.operands[1]);
  return !shape.fp8 && CanPad(shape, groups, aligned) && SameBuffers(frame, MakeFrame(shape, groups, aligned));
}

void ExpectCall(const Frame& frame) {
  const std::vector<FrameBuffer>& results = frame.results;
  DualProblem problem = {};
  problem.input = InputOf(frame, frame.attributes[1].value);
  problem.group_sizes = static_cast<const int32_t*>(frame.operands[1].data);
  problem.groups = frame.operands[1].dims.back();
  problem.padded_tokens = results[2].dims.back();
  problem.aligned = frame.attributes[0].value;
  problem.row_values = static_cast<uint8_t*>(results[0].data);
  problem.row_dequant_scales = static_cast<float*>(results[1].data);
  problem.column_values = static_cast<uint8_t*>(results[2].data);
  problem.column_dequant_scales = static_cast<float*>(results[3].data);
  problem.padded_sizes = static_cast<int32_t*>(results[4].data);
  Solve(problem);
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  Arena arena;
  const LargeInput large(arena);
  const int64_t features = large.input.features, blocks = CeilDiv(features, kBlock), tokens = large.input.tokens;
  std::vector<uint8_t> rows(kBlock * features), columns(features * kBlock);
  std::vector<float> row_scales(blocks * kBlock), column_scales(features);
  QuantizeRows(large.block, 0, kBlock, rows.data(), row_scales.data());
  QuantizeColumns(large.block, 0, kBlock, kBlock, kBlock, columns.data(), column_scales.data());
  const DualProblem problem = {large.input,
                               arena.Upload(Sizes{static_cast<int32_t>(tokens)}),
                               1,
                               tokens,
                               true,
                               arena.Allocate<uint8_t>(tokens * features),
                               arena.Allocate<float>(blocks * tokens),
                               arena.Allocate<uint8_t>(features * tokens),
                               arena.Allocate<float>(tokens / kBlock * features),
                               arena.Allocate<int32_t>(1)};
  if (const char* error = DualOnCuda(problem, nullptr)) return error;
  for (const std::string& difference :
       {CompareRepeated(problem.row_values, features, rows, features, kBlock * features),
        CompareRepeated(problem.row_dequant_scales, tokens, row_scales, kBlock, kBlock),
        CompareRepeated(problem.column_values, tokens, columns, kBlock, kBlock),
        CompareRepeated(problem.column_dequant_scales, features, column_scales, features, features)}) {
    if (!difference.empty()) return difference;
  }
  return "";
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  const auto add = [&](const std::string& kind, const InputSize& size, int64_t multiple, int64_t used) {
    const bool aligned = multiple == kBlock;
    const int64_t padded = PaddedTokens(size.tokens, size.experts, aligned);
    const int64_t row_scales = CeilDiv(size.features, kBlock) * size.tokens;
    const int64_t column_scales = padded / kBlock * size.features;
    const double written = static_cast<double>(size.tokens + padded) * size.features +
                           static_cast<double>(row_scales + column_scales) * sizeof(float);
    const auto prepare = [=](Arena& arena) {
      const DualProblem problem = {MakeBenchInput(size, arena),
                                   arena.Upload(SpreadTokens(used, size.experts, multiple)),
                                   size.experts,
                                   padded,
                                   aligned,
                                   arena.Allocate<uint8_t>(size.tokens * size.features),
                                   arena.Allocate<float>(row_scales),
                                   arena.Allocate<uint8_t>(size.features * padded),
                                   arena.Allocate<float>(column_scales),
                                   arena.Allocate<int32_t>(size.experts)};
      return Prepared{[problem] { return DualOnCuda(problem, nullptr); }};
    };
    benchmarks.push_back({"dual-" + size.Name(kind), BytesRead(size, used) + written, 0, prepare});
  };
  for (const InputSize& size : LayerSizes()) {
    add("", size, kBlock, size.tokens);
    add("-random", size, 1, size.tokens);
    add("-quarter-random", size, 1, size.tokens / 4);
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "dual";
  operation.named = NamedTests;
  operation.random = RandomTest;
  operation.replayed = ReplayedTests;
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {DualCpu, MakeDualCall, IsRightCall, AnyAlignment, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
