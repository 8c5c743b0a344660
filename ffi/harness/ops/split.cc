// fused_transpose_split_quant in the harness.

#include "split/split.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "core/numerics.h"
#include "harness/operation.h"
#include "harness/ops/input.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include "harness/ops/input_cuda.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(SplitCpu);
#endif

namespace jax_tsq::harness {
namespace {

using Counts = std::vector<int64_t>;

struct SplitCase : InputCase {
  Counts tokens_per_expert;
};

void Solve(const SplitProblem& problem) {
  const Input& input = problem.input;
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    for (const Expert& expert : problem.experts) {
      const int64_t blocks = CeilDiv(expert.tokens, kBlock);
      uint8_t* out = expert.out + batch * input.features * expert.tokens;
      float* dequant_scales = expert.dequant_scales + batch * blocks * input.features;
      for (int64_t token = 0; token < expert.tokens; token += kBlock) {
        const int64_t rows = std::min<int64_t>(kBlock, expert.tokens - token);
        QuantizeColumns(input, batch * input.tokens + expert.first_token + token, rows, rows, expert.tokens,
                        out + token, dequant_scales + token / kBlock * input.features);
      }
    }
  }
}

class SplitTest : public Test {
 public:
  explicit SplitTest(SplitCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override {
    return harness::Describe(c_) + " tokens per expert" + harness::Describe(c_.tokens_per_expert);
  }

  Memory MakeMemory() const override {
    Memory memory;
    AddInputArrays(c_, Counts(c_.batch, c_.tokens), memory);
    const Layout layout = LayOut();
    AddOutput(memory, "out", layout.out_end);
    AddOutput(memory, "dequant_scales", layout.scales_end);
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    SplitOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return SplitOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  enum { kOut = kInputArrays, kDequantScales };

  // Where each expert's results lie: apart from each other.
  struct Layout {
    std::vector<size_t> out, dequant_scales;
    size_t out_end = 0, scales_end = 0;
  };

  Layout LayOut() const {
    const auto place = [](size_t& end, size_t bytes, size_t offset) {
      constexpr size_t kGap = 64;
      const size_t position = (end + kGap + 15) / 16 * 16 + offset;
      end = position + bytes + kGap;
      return position;
    };
    Layout layout;
    for (const int64_t tokens : c_.tokens_per_expert) {
      layout.out.push_back(place(layout.out_end, c_.batch * c_.features * tokens, c_.out_offset));
      const size_t scales = c_.batch * CeilDiv(tokens, kBlock) * c_.features;
      layout.dequant_scales.push_back(
          place(layout.scales_end, scales * sizeof(float), c_.scales_offset * sizeof(float)));
    }
    return layout;
  }

  SplitProblem Problem(const Addresses& addresses) const {
    SplitProblem problem = {MakeInput(c_, addresses), {}};
    const Layout layout = LayOut();
    int64_t token = 0;
    for (size_t i = 0; i < c_.tokens_per_expert.size(); ++i) {
      const int64_t tokens = c_.tokens_per_expert[i];
      Expert expert = {token, tokens, nullptr, nullptr};
      if (tokens > 0) {
        expert.out = addresses[kOut] + layout.out[i];
        expert.dequant_scales = reinterpret_cast<float*>(addresses[kDequantScales] + layout.dequant_scales[i]);
      }
      problem.experts.push_back(expert);
      token += tokens;
    }
    return problem;
  }

  const SplitCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

SplitCase MakeCase(std::string name, const Counts& counts, int64_t features) {
  SplitCase c;
  c.name = std::move(name);
  c.tokens = Sum(counts);
  c.features = features;
  c.tokens_per_expert = counts;
  return c;
}

Tests NamedTests() {
  Tests tests;
  const auto add = [&](const SplitCase& c) { tests.push_back(std::make_unique<SplitTest>(c)); };
  Counts staircase(41);
  std::iota(staircase.begin(), staircase.end(), 0);
  for (const auto& [name, counts] : std::vector<std::pair<std::string, Counts>>{
           {"the documented example", {128, 128, 128}},
           {"no experts", {}},
           {"unused experts only", {0, 0}},
           {"unused experts", {0, 128, 0, 0, 256, 0}},
           {"one token", {1}},
           {"every short count", staircase},
           {"long odd experts", {1537, 511, 700, 129}},
           {"long experts of 16", {1040, 528, 16}},
           {"long and short", {1200, 1, 0, 3}},
       }) {
    for (const int64_t features : {0, 1, 65, 136, 512}) ForEachVariant(MakeCase(name, counts, features), add);
  }
  for (const int64_t tokens : {4112, 4224}) ForEachVariant(MakeCase("one very long expert", {tokens}, 136), add);
  add(MakeCase("an input that is not small", {4096, 4096, 4096, 4096, 128}, 1032));
  add(MakeCase("more whole experts than a launch takes", Counts(1025, 128), 24));
  for (const int64_t experts : {1024, 1025, 2500}) {
    Counts counts(experts, 1);
    ForEachVariant(MakeCase("an expert a token", counts, 9), add);
    for (int64_t i = 0; i < experts; ++i) counts[i] = i % 4;
    ForEachVariant(MakeCase("many experts", counts, 24), add);
    SplitCase c = MakeCase("many experts, batched", Counts(experts, 16), 8);
    c.batch = 2;
    ForEachVariant(c, add);
  }
  for (const int64_t batch : {0, 3}) {
    SplitCase c = MakeCase("batched", {130, 0, 257}, 72);
    c.batch = batch;
    ForEachVariant(c, add);
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  SplitCase c;
  MakeRandom(random, c);
  c.batch = random() % 4 ? 1 : Uniform(random, 2, 3);
  c.tokens_per_expert = RandomCounts(random);
  c.tokens = Sum(c.tokens_per_expert);
  return std::make_unique<SplitTest>(c);
}

// Every finite bf16 element beside every finite block maximum: what the conversion of a bfloat16 depends on.
Tests PairTests() {
  constexpr int64_t kFeatures = 4096;
  Tests tests;
  for (int64_t first = 0; first < CountPairColumns(); first += kFeatures) {
    for (const bool pow_2_scales : {false, true}) {
      SplitCase c = MakeCase("pairs", {kBlock}, kFeatures);
      c.data = Data::kPairs;
      c.first_column = first;
      c.pow_2_scales = pow_2_scales;
      tests.push_back(std::make_unique<SplitTest>(c));
    }
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

Frame MakeFrame(const InputShape& shape, const Counts& counts) {
  Frame frame;
  AddInput(shape, {}, frame.operands);
  for (const int64_t count : counts) Add(frame.results, kE4m3, shape.batch, {shape.features, count});
  for (const int64_t count : counts) Add(frame.results, kF32, shape.batch, {Blocks(count), shape.features});
  return frame;
}

Frame MakeSplitCall(Bytes& bytes) {
  Counts counts;
  InputShape shape = MakeInputShape(bytes, counts);
  if (MakeHugeInput(bytes, shape) && !counts.empty()) {
    std::fill(counts.begin(), counts.end(), 0);
    counts[bytes.Next() % counts.size()] = shape.tokens;
  }
  Frame frame = MakeFrame(shape, counts);
  frame.attributes = {Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  if (!HasFlags(frame, {"pow_2_scales"})) return false;
  Counts counts;
  Wide sum = 0;
  for (size_t i = 0; i < frame.results.size() / 2; ++i) {
    counts.push_back(Last(frame.results[i]));
    if (counts.back() < 0) return false;
    sum += counts.back();
  }
  const InputShape shape = InputShapeOf(frame);
  return sum == shape.tokens && SameBuffers(frame, MakeFrame(shape, counts));
}

void ExpectCall(const Frame& frame) {
  SplitProblem problem = {InputOf(frame, frame.attributes[0].value), {}};
  const size_t experts = frame.results.size() / 2;
  int64_t token = 0;
  for (size_t i = 0; i < experts; ++i) {
    const int64_t tokens = frame.results[i].dims.back();
    problem.experts.push_back({token, tokens, static_cast<uint8_t*>(frame.results[i].data),
                               static_cast<float*>(frame.results[experts + i].data)});
    token += tokens;
  }
  Solve(problem);
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

std::string CheckLarge() {
  return CheckLargeColumns([](const Input& input, uint8_t* out, float* dequant_scales, Arena&) {
    return SplitOnCuda({input, {{0, input.tokens, out, dequant_scales}}}, nullptr);
  });
}

// XLA aligns every result to 256 bytes or more.
Prepared Prepare(const InputSize& size, const std::vector<int32_t>& counts, Arena& arena) {
  SplitProblem problem = {MakeBenchInput(size, arena), {}};
  int64_t token = 0;
  for (const int32_t count : counts) {
    problem.experts.push_back({token, count, arena.Allocate<uint8_t>(size.batch * size.features * count),
                               arena.Allocate<float>(size.batch * CeilDiv(int64_t{count}, kBlock) * size.features)});
    token += count;
  }
  return {[problem] { return SplitOnCuda(problem, nullptr); }};
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  const auto add = [&](const std::string& kind, const InputSize& size, int64_t multiple) {
    const std::vector<int32_t> counts = SpreadTokens(size.tokens, size.experts, multiple);
    int64_t blocks = 0;
    for (const int32_t count : counts) blocks += CeilDiv(int64_t{count}, kBlock);
    const double written = static_cast<double>(size.tokens) * size.features + 4.0 * blocks * size.features;
    benchmarks.push_back({"split-" + size.Name(kind), BytesRead(size, size.tokens) + size.batch * written, 0,
                          [=](Arena& arena) { return Prepare(size, counts, arena); }});
  };
  for (const char* const kind : {"", "-random", "-k7", "-k7-random"}) {
    const std::string text = kind;
    const int64_t multiple = text.find("random") == std::string::npos ? kBlock : 1;
    for (const InputType type : {InputType::kBf16, InputType::kFp8}) {
      for (InputSize size : BenchSizes()) {
        size.type = type;
        if (text.find("k7") != std::string::npos) size.features -= 7;
        add(text, size, multiple);
      }
    }
  }
  for (const int64_t experts : {1, 16, 256, 1024, 4096}) {
    add("-flat", {131072, 4096, experts}, experts > 1024 ? 16 : kBlock);
  }
  add("-random", {131072, 4096, 2048}, 1);
  add("-vmap8", {8192, 4096, 16, InputType::kBf16, 8}, kBlock);
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "split";
  operation.named = NamedTests;
  operation.random = RandomTest;
  operation.pairs = PairTests;
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {SplitCpu, MakeSplitCall, IsRightCall, AnyAlignment, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
