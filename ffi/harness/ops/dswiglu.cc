// swiglu_backward_quantize in the harness.

#include "dswiglu/dswiglu.h"

#include <algorithm>
#include <memory>

#include "core/groups.h"
#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/swiglu_input.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include <cuda_runtime.h>

#include "harness/cuda_errors.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(DswigluCpu);
#endif

namespace jax_tsq::harness {
namespace {

void Solve(const DswigluProblem& p) {
  const SwigluInput& input = p.input;
  const SwigluRows rows = SolveRows(input, p.aligned, p.dh);
  const int64_t both = 2 * input.features;
  const Input do1 = InputOf(input, rows.do1, both), h = InputOf(input, rows.h, input.features);
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    QuantizeRows(do1, batch, input.tokens, p.row_values + batch * input.tokens * both,
                 p.row_dequant_scales + batch * (both / kBlock) * input.tokens);
  }
  QuantizeGroups(do1, input.group_sizes, input.groups, p.aligned,
                 {p.padded_tokens, false, p.column_values, p.column_dequant_scales, p.padded_sizes});
  QuantizeGroups(h, input.group_sizes, input.groups, p.aligned,
                 {p.padded_tokens, false, p.h_values, p.h_dequant_scales, p.padded_sizes});
  std::copy(rows.dweights.begin(), rows.dweights.end(), p.dweights);
  std::copy(rows.block_sums.begin(), rows.block_sums.end(), p.block_sums);
}

class DswigluTest : public Test {
 public:
  explicit DswigluTest(SwigluCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override { return harness::Describe(c_); }

  Memory MakeMemory() const override {
    Memory memory;
    const int64_t rows = c_.batch * c_.tokens, padded = c_.batch * c_.Padded();
    const int64_t blocks = c_.features / kBlock, weighted = c_.weighted ? rows : 0;
    const size_t offset = c_.scales_offset * sizeof(float);
    AddSwigluArrays(c_, memory);
    AddMatrix(c_, "dh", c_.features, 2, memory);
    AddOutput(memory, "row_values", 2 * rows * c_.features, c_.out_offset);
    AddOutput(memory, "row_dequant_scales", 2 * rows * blocks * sizeof(float), offset);
    AddOutput(memory, "column_values", 2 * padded * c_.features, c_.out_offset);
    AddOutput(memory, "column_dequant_scales", 2 * padded * blocks * sizeof(float), offset);
    AddOutput(memory, "h_values", padded * c_.features, c_.out_offset);
    AddOutput(memory, "h_dequant_scales", padded * blocks * sizeof(float), offset);
    AddOutput(memory, "padded_sizes", c_.sizes.size() * sizeof(int32_t));
    AddOutput(memory, "dweights", weighted * sizeof(float), offset);
    AddOutput(memory, "block_sums", weighted * blocks * sizeof(float), offset);
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    DswigluOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return DswigluOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum {
    kDh = kSwigluArrays,
    kRowValues,
    kRowDequantScales,
    kColumnValues,
    kColumnDequantScales,
    kHValues,
    kHDequantScales,
    kPaddedSizes,
    kDweights,
    kBlockSums,
  };

  DswigluProblem Problem(const Addresses& addresses) const {
    const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
    return {MakeSwigluInput(c_, addresses),
            addresses[kDh],
            c_.Padded(),
            c_.aligned,
            addresses[kRowValues],
            floats(kRowDequantScales),
            addresses[kColumnValues],
            floats(kColumnDequantScales),
            addresses[kHValues],
            floats(kHDequantScales),
            reinterpret_cast<int32_t*>(addresses[kPaddedSizes]),
            floats(kDweights),
            floats(kBlockSums)};
  }

  const SwigluCase c_;
};

Tests TestsOf(const std::vector<SwigluCase>& cases) {
  Tests tests;
  for (const SwigluCase& c : cases) tests.push_back(std::make_unique<DswigluTest>(c));
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const SwigluShape& shape, bool aligned) {
  const int64_t features = shape.features / 2, blocks = features / kBlock;
  const Wide padded = PaddedSize(shape, shape.groups, aligned);
  Frame frame;
  std::vector<FrameBuffer> dh;
  Add(dh, kBf16, shape.batch, {shape.tokens, features});
  AddOperands(shape, dh, frame.operands);
  Add(frame.results, kE4m3, shape.batch, {shape.tokens, shape.features});
  Add(frame.results, kF32, shape.batch, {shape.tokens, 2 * blocks});
  Add(frame.results, kE4m3, shape.batch, {shape.features, padded});
  Add(frame.results, kF32, shape.batch, {padded / 128, shape.features});
  Add(frame.results, kE4m3, shape.batch, {features, padded});
  Add(frame.results, kF32, shape.batch, {padded / 128, features});
  Add(frame.results, kS32, shape.batch, {shape.groups});
  if (shape.weighted) {
    Add(frame.results, kF32, shape.batch, {shape.tokens});
    Add(frame.results, kF32, shape.batch, {blocks, shape.tokens});
  }
  return frame;
}

Frame MakeDswigluCall(Bytes& bytes) {
  const SwigluShape shape = MakeSwigluShape(bytes);
  const bool aligned = bytes.Flag();
  Frame frame = MakeFrame(shape, aligned);
  frame.attributes = {Flag("aligned", aligned), LimitAttribute(bytes), Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlagsAndLimit(frame, {"aligned", "pow_2_scales"}) || frame.operands.size() < 3) return false;
  const bool aligned = frame.attributes[0].value;
  const SwigluShape shape = SwigluShapeOf(frame, 2);
  return IsRightShape(shape) && CanPad(shape, shape.groups, aligned) && SameBuffers(frame, MakeFrame(shape, aligned));
}

bool IsAlignedCall(const Frame& frame) {
  return IsAligned(frame.operands[0]) && IsAligned(frame.operands[1]) && IsAligned(frame.results[0]) &&
         IsAligned(frame.results[2]) && IsAligned(frame.results[4]);
}

void ExpectCall(const Frame& frame) {
  const auto bytes = [&](int i) { return static_cast<uint8_t*>(frame.results[i].data); };
  const auto floats = [&](int i) { return static_cast<float*>(frame.results[i].data); };
  const bool weighted = frame.results.size() > 7;
  Solve({SwigluInputOf(frame, 2, frame.attributes[2].value), frame.operands[1].data, frame.results[2].dims.back(),
         frame.attributes[0].value != 0, bytes(0), floats(1), bytes(2), floats(3), bytes(4), floats(5),
         static_cast<int32_t*>(frame.results[6].data), weighted ? floats(7) : nullptr, weighted ? floats(8) : nullptr});
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  Arena arena;
  const LargeInput large(arena);
  const int64_t both = large.input.features, features = both / 2, blocks = features / kBlock;
  const int64_t tokens = large.input.tokens;
  // The gates as gradients, too.
  std::vector<uint16_t> block_dh;
  for (int64_t row = 0; row < kBlock; ++row) {
    block_dh.insert(block_dh.end(), large.rows.begin() + row * both, large.rows.begin() + row * both + features);
  }
  auto* dh = arena.Allocate<uint16_t>(tokens * features);
  CheckCuda(cudaMemcpy2D(dh, 2 * features, large.input.x, 2 * both, 2 * features, tokens, cudaMemcpyDefault));

  std::vector<uint8_t> rows(kBlock * both), columns(both * kBlock), h(features * kBlock);
  std::vector<float> row_scales(2 * blocks * kBlock), column_scales(both), h_scales(features);
  const int32_t block_size = kBlock;
  int32_t padded_size;
  Solve({{large.block.x, nullptr, &block_size, 1, kBlock, features, 1, false, kNoLimit},
         block_dh.data(),
         kBlock,
         true,
         rows.data(),
         row_scales.data(),
         columns.data(),
         column_scales.data(),
         h.data(),
         h_scales.data(),
         &padded_size,
         nullptr,
         nullptr});
  const DswigluProblem problem = {{large.input.x, nullptr, arena.Upload(Sizes{static_cast<int32_t>(tokens)}), 1, tokens,
                                   features, 1, false, kNoLimit},
                                  dh,
                                  tokens,
                                  true,
                                  arena.Allocate<uint8_t>(tokens * both),
                                  arena.Allocate<float>(2 * blocks * tokens),
                                  arena.Allocate<uint8_t>(both * tokens),
                                  arena.Allocate<float>(tokens / kBlock * both),
                                  arena.Allocate<uint8_t>(features * tokens),
                                  arena.Allocate<float>(tokens / kBlock * features),
                                  arena.Allocate<int32_t>(1),
                                  nullptr,
                                  nullptr};
  if (const char* error = DswigluOnCuda(problem, nullptr)) return error;
  for (const std::string& difference :
       {CompareRepeated(problem.row_values, both, rows, both, kBlock * both),
        CompareRepeated(problem.row_dequant_scales, tokens, row_scales, kBlock, kBlock),
        CompareRepeated(problem.column_values, tokens, columns, kBlock, kBlock),
        CompareRepeated(problem.column_dequant_scales, both, column_scales, both, both),
        CompareRepeated(problem.h_values, tokens, h, kBlock, kBlock),
        CompareRepeated(problem.h_dequant_scales, features, h_scales, features, features)}) {
    if (!difference.empty()) return difference;
  }
  return "";
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  for (const SwigluSize& size : SwigluSizes("dswiglu")) {
    const auto [tokens, features, groups, type, batch] = size.size;
    const bool aligned = size.multiple == kBlock;
    const int64_t padded = PaddedTokens(tokens, groups, aligned);
    const int64_t row_scales = 2 * features / kBlock * tokens, h_scales = padded / kBlock * features;
    const auto prepare = [=, tokens = tokens, features = features, groups = groups](Arena& arena) {
      const DswigluProblem problem = {MakeBenchSwiglu(size, arena),
                                      arena.Bf16(tokens * features),
                                      padded,
                                      aligned,
                                      arena.Allocate<uint8_t>(tokens * 2 * features),
                                      arena.Allocate<float>(row_scales),
                                      arena.Allocate<uint8_t>(2 * features * padded),
                                      arena.Allocate<float>(2 * h_scales),
                                      arena.Allocate<uint8_t>(features * padded),
                                      arena.Allocate<float>(h_scales),
                                      arena.Allocate<int32_t>(groups),
                                      arena.Allocate<float>(tokens),
                                      arena.Allocate<float>(features / kBlock * tokens)};
      return Prepared{[problem] { return DswigluOnCuda(problem, nullptr); }};
    };
    // The workspace is not counted.
    const double read = static_cast<double>(size.used) * (3 * features * sizeof(uint16_t) + sizeof(float));
    const double values = static_cast<double>(features) * (2 * tokens + 3 * padded);
    const double scales = static_cast<double>(row_scales + 3 * h_scales + tokens) * sizeof(float);
    benchmarks.push_back({size.name, read + values + scales, 0, prepare});
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "dswiglu";
  operation.named = [] { return TestsOf(NamedSwigluCases()); };
  operation.random = [](std::mt19937& random) { return std::make_unique<DswigluTest>(RandomSwigluCase(random)); };
  operation.replayed = [] { return TestsOf(ReplayedSwigluCases()); };
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {DswigluCpu, MakeDswigluCall, IsRightCall, IsAlignedCall, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
