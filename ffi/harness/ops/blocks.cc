// quantize_blocks in the harness.

#include "blocks/blocks.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <sstream>

#include "core/limits.h"
#include "core/numerics.h"
#include "harness/data.h"
#include "harness/operation.h"
#include "harness/ops/input.h"
#include "harness/oracle.h"
#ifdef JAX_TSQ_CUDA
#include "harness/ops/input_cuda.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "xla/ffi/api/ffi.h"
XLA_FFI_DECLARE_HANDLER_SYMBOL(BlocksCpu);
#endif

namespace jax_tsq::harness {
namespace {

struct BlocksCase {
  std::string name;
  WeightType type = WeightType::kBf16;
  bool pow_2_scales = false;
  Data data = Data::kEdge;
  int64_t experts = 1;
  int64_t rows = 0;
  std::vector<int64_t> columns;  // of each part
  // Distance in elements from the alignment of an allocation
  int weights_offset = 0;
  int out_offset = 0;
  unsigned seed = 1;
  int64_t first_column = 0;  // of kPairs
};

float Weight(const BlocksProblem& p, int64_t row, int64_t column) {
  const WeightPart* part = p.parts;
  for (; column >= part->columns; ++part) column -= part->columns;
  const int64_t index = row * part->columns + column;
  if (p.type == WeightType::kBf16) return DecodeBf16(static_cast<const uint16_t*>(part->weights)[index]);
  return DecodeBf16(EncodeBf16(static_cast<const float*>(part->weights)[index]));
}

void Solve(const BlocksProblem& p) {
  float* dequant_scale = p.dequant_scales;
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    for (int64_t first_row = 0; first_row < p.rows; first_row += kBlock) {
      for (int64_t first_column = 0; first_column < p.columns; first_column += kBlock) {
        const int64_t rows = std::min<int64_t>(kBlock, p.rows - first_row);
        const int64_t columns = std::min<int64_t>(kBlock, p.columns - first_column);
        std::vector<float> weights;
        for (int64_t i = 0; i < rows * columns; ++i) {
          weights.push_back(Weight(p, expert * p.rows + first_row + i / columns, first_column + i % columns));
        }
        std::vector<uint8_t> codes(weights.size());
        *dequant_scale++ = QuantizeTogether(weights, p.pow_2_scales, codes.data());
        for (int64_t i = 0; i < rows * columns; ++i) {
          const int64_t row = first_row + i / columns, column = first_column + i % columns;
          p.values[(expert * p.rows + row) * p.columns + column] = codes[i];
          p.transposed[(expert * p.columns + column) * p.rows + row] = codes[i];
        }
      }
    }
  }
}

// Weights of a part, every block of one kind. kPairs are a column of each expert.
void Fill(const BlocksCase& c, std::mt19937& random, int64_t columns, uint8_t* weights) {
  const bool is_float = c.type == WeightType::kFloat32;
  constexpr std::array<uint32_t, 6> kLowHalves = {0, 0x8000, 0x7FFF, 0x8001, 1, 0xFFFF};
  for (int64_t expert = 0; expert < c.experts; ++expert) {
    for (int64_t block = 0; block < CeilDiv(c.rows, kBlock) * CeilDiv(columns, kBlock); ++block) {
      const int64_t first_row = block / CeilDiv(columns, kBlock) * kBlock;
      const int64_t first_column = block % CeilDiv(columns, kBlock) * kBlock;
      std::array<uint16_t, kBlock> some;
      FillBf16(c.data, random, kBlock, 1, c.first_column + expert, some.data());
      for (int64_t row = first_row; row < std::min(c.rows, first_row + kBlock); ++row) {
        for (int64_t column = first_column; column < std::min(columns, first_column + kBlock); ++column) {
          const int64_t index = (expert * c.rows + row) * columns + column;
          const uint16_t high = some[c.data == Data::kPairs ? row : random() % kBlock];
          if (is_float) {
            const uint32_t bits = uint32_t{high} << 16 | kLowHalves[random() % kLowHalves.size()];
            std::memcpy(weights + index * sizeof(bits), &bits, sizeof(bits));
          } else {
            std::memcpy(weights + index * sizeof(high), &high, sizeof(high));
          }
        }
      }
    }
  }
}

class BlocksTest : public Test {
 public:
  explicit BlocksTest(BlocksCase c) : c_(std::move(c)) {}

  std::string name() const override { return c_.name; }
  std::string Describe() const override {
    std::ostringstream text;
    text << (c_.type == WeightType::kBf16 ? "bf16" : "float32") << (c_.pow_2_scales ? " pow2" : "") << " experts "
         << c_.experts << " rows " << c_.rows << " columns" << harness::Describe(c_.columns) << " offsets weights "
         << c_.weights_offset << " out " << c_.out_offset << " data " << static_cast<int>(c_.data) << " seed "
         << c_.seed << " first column " << c_.first_column;
    return text.str();
  }

  Memory MakeMemory() const override {
    Memory memory;
    std::mt19937 random(c_.seed);
    const int64_t bytes = c_.type == WeightType::kBf16 ? 2 : 4;
    for (const int64_t columns : c_.columns) {
      const int64_t size = c_.experts * c_.rows * columns * bytes;
      Fill(c_, random, columns, AddInput(memory, "weights", size, c_.weights_offset * bytes).data());
    }
    const int64_t columns = Sum(c_.columns);
    AddOutput(memory, "values", c_.experts * c_.rows * columns, c_.out_offset);
    AddOutput(memory, "transposed", c_.experts * c_.rows * columns, c_.out_offset);
    AddOutput(memory, "dequant_scales",
              c_.experts * CeilDiv(c_.rows, kBlock) * CeilDiv(columns, kBlock) * sizeof(float),
              c_.out_offset % 4 * sizeof(float));
    return memory;
  }

  void Expect(const Addresses& addresses) const override { Solve(Problem(addresses)); }
  const char* RunOnCpu(const Addresses& addresses, const Executor& executor, CpuLevel level) const override {
    BlocksOnCpu(Problem(addresses), executor, level);
    return nullptr;
  }
#ifdef JAX_TSQ_CUDA
  const char* RunOnCuda(const Addresses& addresses, Stream stream) const override {
    return BlocksOnCuda(Problem(addresses), stream);
  }
#endif

 private:
  BlocksProblem Problem(const Addresses& addresses) const {
    const size_t parts = c_.columns.size();
    BlocksProblem problem = {};
    problem.type = c_.type;
    for (size_t i = 0; i < parts; ++i) problem.parts[problem.num_parts++] = {addresses[i], c_.columns[i]};
    problem.experts = c_.experts;
    problem.rows = c_.rows;
    problem.columns = Sum(c_.columns);
    problem.pow_2_scales = c_.pow_2_scales;
    problem.values = addresses[parts];
    problem.transposed = addresses[parts + 1];
    problem.dequant_scales = reinterpret_cast<float*>(addresses[parts + 2]);
    return problem;
  }

  const BlocksCase c_;
};

// --- Cases -----------------------------------------------------------------------------------------------------------

BlocksCase MakeCase(std::string name, int64_t experts, int64_t rows, std::vector<int64_t> columns) {
  BlocksCase c;
  c.name = std::move(name);
  c.experts = experts;
  c.rows = rows;
  c.columns = std::move(columns);
  return c;
}

Tests NamedTests() {
  Tests tests;
  for (BlocksCase c : {
           MakeCase("one weight", 1, 1, {1}),
           MakeCase("whole blocks", 2, 256, {384}),
           MakeCase("partial blocks", 3, 200, {136}),
           MakeCase("nothing in line", 2, 131, {259}),
           MakeCase("no experts", 0, 9, {9}),
           MakeCase("no rows", 2, 0, {9}),
           MakeCase("no columns", 2, 9, {0, 0}),
           MakeCase("two parts", 2, 136, {128, 256}),
           MakeCase("parts that share blocks", 2, 130, {200, 3, 0, 57}),
           MakeCase("as many parts as there may be", 1, 64, std::vector<int64_t>(kMostParts, 24)),
           MakeCase("wide", 1, 100, {2600}),
       }) {
    for (const int variant : {0, 1, 2, 3, 4, 5, 6, 7}) {
      c.type = variant & 1 ? WeightType::kFloat32 : WeightType::kBf16;
      c.pow_2_scales = variant & 2;
      c.weights_offset = c.out_offset = variant & 4 ? 1 : 0;
      tests.push_back(std::make_unique<BlocksTest>(c));
    }
  }
  return tests;
}

std::unique_ptr<Test> RandomTest(std::mt19937& random) {
  const auto size = [&] {
    const int64_t step = std::array<int64_t, 4>{128, 16, 8, 1}[random() % 4];
    return Uniform(random, 1, 400) / step * step;
  };
  BlocksCase c = MakeCase("random", Uniform(random, 1, 3), size(), {});
  for (int64_t parts = random() % 3 ? 1 : Uniform(random, 2, 5); parts > 0; --parts) c.columns.push_back(size());
  c.type = random() % 2 ? WeightType::kFloat32 : WeightType::kBf16;
  c.pow_2_scales = random() % 2;
  c.data = static_cast<Data>(random() % 3);
  c.seed = random();
  if (random() % 2) {
    c.weights_offset = static_cast<int>(Uniform(random, 0, 7));
    c.out_offset = static_cast<int>(Uniform(random, 0, 15));
  }
  return std::make_unique<BlocksTest>(c);
}

Tests PairTests() {
  constexpr int64_t kExperts = 4096;
  Tests tests;
  for (int64_t first = 0; first < CountPairColumns(); first += kExperts) {
    for (const bool pow_2_scales : {false, true}) {
      BlocksCase c = MakeCase("pairs", kExperts, kBlock, {1});
      c.data = Data::kPairs;
      c.first_column = first;
      c.pow_2_scales = pow_2_scales;
      tests.push_back(std::make_unique<BlocksTest>(c));
    }
  }
  return tests;
}

Tests ReplayedTests() {
  Tests tests;
  for (const unsigned seed : {1, 2, 3}) {
    BlocksCase c = MakeCase("replay", 2, 200, {136, 120});
    c.seed = seed;
    tests.push_back(std::make_unique<BlocksTest>(c));
  }
  return tests;
}

// --- Calls -----------------------------------------------------------------------------------------------------------

#ifdef JAX_TSQ_HANDLERS

struct WeightShape {
  XLA_FFI_DataType type;
  Dims experts;
  int64_t rows;
  std::vector<int64_t> columns;
};

Frame MakeFrame(const WeightShape& shape) {
  Frame frame;
  Wide columns = 0;
  for (const int64_t part : shape.columns) {
    Add(frame.operands, shape.type, shape.experts, {shape.rows, part});
    columns += part;
  }
  Add(frame.results, kE4m3, shape.experts, {shape.rows, columns});
  Add(frame.results, kE4m3, shape.experts, {columns, shape.rows});
  Add(frame.results, kF32, shape.experts, {Blocks(shape.rows), Blocks(columns)});
  return frame;
}

Frame MakeBlocksCall(Bytes& bytes) {
  WeightShape shape = {bytes.Flag() ? kF32 : kBf16, SmallBatch(bytes), SmallSize(bytes), {}};
  shape.experts.push_back(bytes.Next() % 4);
  shape.columns.resize(bytes.Next() % 16 ? 1 + bytes.Next() % 3 : bytes.Next() % 20);
  for (int64_t& columns : shape.columns) columns = SmallSize(bytes) % (shape.columns.size() > 3 ? 9 : 300);
  if (bytes.Next() % 8 == 0 && !shape.columns.empty()) {
    shape.experts.resize(1);
    MakeHuge(bytes, {&shape.experts[0], &shape.rows, &shape.columns[0]});
  }
  Frame frame = MakeFrame(shape);
  frame.attributes = {Flag("pow_2_scales", bytes.Flag())};
  return frame;
}

bool IsRightCall(const Frame& frame) {
  const FrameBuffer& first = frame.operands[0];
  if (!HasFlags(frame, {"pow_2_scales"}) || first.dims.size() < 3 || frame.operands.size() > kMostParts) return false;
  if (first.type != kF32 && first.type != kBf16) return false;
  WeightShape shape = {
      first.type, Dims(first.dims.begin(), first.dims.end() - 2), first.dims[first.dims.size() - 2], {}};
  for (const FrameBuffer& part : frame.operands) {
    if (IsTooLarge(part.dims)) return false;
    shape.columns.push_back(Last(part));
  }
  const Frame right = MakeFrame(shape);
  return !IsTooLarge(right.results[0].dims) && SameBuffers(frame, right);
}

void ExpectCall(const Frame& frame) {
  const FrameBuffer& first = frame.operands[0];
  BlocksProblem problem = {};
  problem.type = first.type == kF32 ? WeightType::kFloat32 : WeightType::kBf16;
  for (const FrameBuffer& part : frame.operands) problem.parts[problem.num_parts++] = {part.data, part.dims.back()};
  problem.experts = 1;
  for (size_t i = 0; i + 2 < first.dims.size(); ++i) problem.experts *= first.dims[i];
  problem.rows = first.dims[first.dims.size() - 2];
  problem.columns = frame.results[0].dims.back();
  problem.pow_2_scales = frame.attributes[0].value;
  problem.values = static_cast<uint8_t*>(frame.results[0].data);
  problem.transposed = static_cast<uint8_t*>(frame.results[1].data);
  problem.dequant_scales = static_cast<float*>(frame.results[2].data);
  Solve(problem);
}

#endif

// --- Large problems and benchmarks -----------------------------------------------------------------------------------

#ifdef JAX_TSQ_CUDA

// `dequant_scales` must hold those of all blocks.
BlocksProblem MakeProblem(WeightType type, const void* weights, int64_t experts, int64_t rows, int64_t columns,
                          Arena& arena) {
  BlocksProblem problem = {};
  problem.type = type;
  problem.parts[problem.num_parts++] = {weights, columns};
  problem.experts = experts;
  problem.rows = rows;
  problem.columns = columns;
  problem.values = arena.Allocate<uint8_t>(experts * rows * columns);
  problem.transposed = arena.Allocate<uint8_t>(experts * rows * columns);
  problem.dequant_scales = arena.Allocate<float>(experts * CeilDiv(rows, kBlock) * CeilDiv(columns, kBlock));
  return problem;
}

std::string CheckLarge() {
  Arena arena;
  const LargeInput large(arena);
  const int64_t rows = large.input.tokens, columns = large.input.features, blocks = CeilDiv(columns, kBlock);
  std::vector<uint8_t> values(kBlock * columns), transposed(columns * kBlock);
  std::vector<float> dequant_scales(blocks);
  BlocksProblem block = {};
  block.type = WeightType::kBf16;
  block.parts[block.num_parts++] = {large.block.x, columns};
  block.experts = 1;
  block.rows = kBlock;
  block.columns = columns;
  block.values = values.data();
  block.transposed = transposed.data();
  block.dequant_scales = dequant_scales.data();
  Solve(block);
  const BlocksProblem problem = MakeProblem(WeightType::kBf16, large.input.x, 1, rows, columns, arena);
  if (const char* error = BlocksOnCuda(problem, nullptr)) return error;
  for (const std::string& difference :
       {CompareRepeated(problem.values, columns, values, columns, kBlock * columns),
        CompareRepeated(problem.transposed, rows, transposed, kBlock, kBlock),
        CompareRepeated(problem.dequant_scales, blocks, dequant_scales, blocks, blocks)}) {
    if (!difference.empty()) return difference;
  }
  return "";
}

std::vector<Benchmark> Benchmarks() {
  std::vector<Benchmark> benchmarks;
  for (const auto& [experts, rows, columns] :
       std::vector<std::array<int64_t, 3>>{{8, 7168, 4096}, {64, 2048, 7168}, {32, 4096, 2048}}) {
    for (const WeightType type : {WeightType::kFloat32, WeightType::kBf16}) {
      const bool is_float = type == WeightType::kFloat32;
      const int64_t weights = experts * rows * columns;
      const auto prepare = [=, experts = experts, rows = rows, columns = columns](Arena& arena) {
        const void* w = is_float ? static_cast<const void*>(arena.Scales(weights)) : arena.Bf16(weights);
        const BlocksProblem problem = MakeProblem(type, w, experts, rows, columns, arena);
        return Prepared{[problem] { return BlocksOnCuda(problem, nullptr); }};
      };
      const double scales = static_cast<double>(experts * CeilDiv(rows, kBlock) * CeilDiv(columns, kBlock));
      benchmarks.push_back({std::string("blocks-") + (is_float ? "f32" : "bf16") + "-" + std::to_string(rows) + "x" +
                                std::to_string(columns) + "-E" + std::to_string(experts),
                            static_cast<double>(weights) * (is_float ? 6 : 4) + scales * sizeof(float), 0, prepare});
    }
  }
  return benchmarks;
}

#endif

const Registration registration([] {
  Operation operation;
  operation.name = "blocks";
  operation.named = NamedTests;
  operation.random = RandomTest;
  operation.replayed = ReplayedTests;
  operation.pairs = PairTests;
#ifdef JAX_TSQ_CUDA
  operation.large = CheckLarge;
  operation.benchmarks = Benchmarks;
#endif
#ifdef JAX_TSQ_HANDLERS
  operation.calls = {BlocksCpu, MakeBlocksCall, IsRightCall, AnyAlignment, ExpectCall};
#endif
  return operation;
}());

}  // namespace
}  // namespace jax_tsq::harness
