// swiglu_quantize in the harness.

#include "swiglu/swiglu.h"

#include <memory>

#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/swiglu_input.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluCpu);
#endif

namespace jax_tsq::harness {
namespace {

void Solve(const SwigluProblem& p) {
  const SwigluInput& input = p.input;
  const SwigluRows rows = SolveRows(input, false, nullptr);
  const Input h = InputOf(input, rows.h, input.features);
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    QuantizeRows(h, batch, input.tokens, p.values + batch * input.tokens * input.features,
                 p.dequant_scales + batch * (input.features / kBlock) * input.tokens);
  }
}

class SwigluTest : public Test {
 public:
  explicit SwigluTest(SwigluCase c) : c_(std::move(c)) { c_.aligned = false; }

  std::string name() const override { return c_.name; }
  std::string Describe() const override { return harness::Describe(c_); }

  Memory MakeMemory() const override {
    Memory memory;
    const int64_t rows = c_.batch * c_.tokens;
    AddSwigluArrays(c_, memory);
    AddOutput(memory, "values", rows * c_.features, c_.out_offset);
    AddOutput(memory, "dequant_scales", rows * c_.features / kBlock * sizeof(float), c_.scales_offset * sizeof(float));
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    SwigluOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return SwigluOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum { kValues = kSwigluArrays, kDequantScales };

  SwigluProblem Problem(const Addresses& addresses) const {
    return {MakeSwigluInput(c_, addresses), addresses[kValues], reinterpret_cast<float*>(addresses[kDequantScales])};
  }

  SwigluCase c_;
};

Tests TestsOf(const std::vector<SwigluCase>& cases) {
  Tests tests;
  for (const SwigluCase& c : cases) tests.push_back(std::make_unique<SwigluTest>(c));
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const SwigluShape& shape) {
  Frame frame;
  AddOperands(shape, {}, frame.operands);
  Add(frame.results, kE4m3, shape.batch, {shape.tokens, shape.features / 2});
  Add(frame.results, kF32, shape.batch, {shape.tokens, shape.features / 2 / kBlock});
  return frame;
}

Frame MakeSwigluCall(Bytes& bytes) {
  Frame frame = MakeFrame(MakeSwigluShape(bytes));
  frame.attributes = {LimitAttribute(bytes), Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlagsAndLimit(frame, {"pow_2_scales"}) || frame.operands.size() < 2) return false;
  const SwigluShape shape = SwigluShapeOf(frame, 1);
  return IsRightShape(shape) && SameBuffers(frame, MakeFrame(shape));
}

bool IsAlignedCall(const Frame& frame) { return IsAligned(frame.operands[0]) && IsAligned(frame.results[0]); }

void ExpectCall(const Frame& frame) {
  Solve({SwigluInputOf(frame, 1, frame.attributes[1].value), static_cast<uint8_t*>(frame.results[0].data),
         static_cast<float*>(frame.results[1].data)});
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  Arena arena;
  const LargeInput large(arena);
  const int64_t features = large.input.features / 2, blocks = features / kBlock, tokens = large.input.tokens;
  std::vector<uint8_t> values(kBlock * features);
  std::vector<float> dequant_scales(blocks * kBlock);
  const int32_t block_size = kBlock;
  Solve({{large.block.x, nullptr, &block_size, 1, kBlock, features, 1, false, kNoLimit},
         values.data(),
         dequant_scales.data()});
  const SwigluProblem problem = {{large.input.x, nullptr, arena.Upload(Sizes{static_cast<int32_t>(tokens)}), 1, tokens,
                                  features, 1, false, kNoLimit},
                                 arena.Allocate<uint8_t>(tokens * features),
                                 arena.Allocate<float>(blocks * tokens)};
  if (const char* error = SwigluOnCuda(problem, nullptr)) return error;
  const std::string difference = CompareRepeated(problem.values, features, values, features, kBlock * features);
  if (!difference.empty()) return difference;
  return CompareRepeated(problem.dequant_scales, tokens, dequant_scales, kBlock, kBlock);
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  for (const SwigluSize& size : SwigluSizes("swiglu")) {
    const int64_t tokens = size.size.tokens, features = size.size.features, scales = features / kBlock * tokens;
    const auto prepare = [=](Arena& arena) {
      const SwigluProblem problem = {MakeBenchSwiglu(size, arena), arena.Allocate<uint8_t>(tokens * features),
                                     arena.Allocate<float>(scales)};
      return Prepared{[problem] { return SwigluOnCuda(problem, nullptr); }};
    };
    const double read = static_cast<double>(size.used) * (2 * features * sizeof(uint16_t) + sizeof(float));
    const double written = static_cast<double>(tokens) * features + static_cast<double>(scales) * sizeof(float);
    benchmarks.push_back({size.name, read + written, 0, prepare});
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "swiglu";
  operation.named = [] { return TestsOf(NamedSwigluCases()); };
  operation.random = [](std::mt19937& random) { return std::make_unique<SwigluTest>(RandomSwigluCase(random)); };
  operation.replayed = [] { return TestsOf(ReplayedSwigluCases()); };
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {SwigluCpu, MakeSwigluCall, IsRightCall, IsAlignedCall, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
