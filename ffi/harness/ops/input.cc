#include "harness/ops/input.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <sstream>

#include "core/numerics.h"

namespace jax_tsq::harness {

int64_t Uniform(std::mt19937& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % (high - low + 1));
}

void MakeRandom(std::mt19937& random, InputCase& c) {
  c.name = "random";
  c.seed = random();
  c.type = random() % 2 ? InputType::kBf16 : InputType::kFp8;
  c.pow_2_scales = random() % 2;
  c.data = static_cast<Data>(random() % 3);
  switch (random() % 5) {
    case 0:
      c.features = 8 * Uniform(random, 1, 40);
      break;
    case 1:
      c.features = 128 * Uniform(random, 1, 3);
      break;
    case 2:
      c.features = Uniform(random, 1, 20);
      break;
    default:
      c.features = Uniform(random, 1, 400);
  }
  if (random() % 2) {
    c.x_offset = static_cast<int>(Uniform(random, 0, 15));
    c.out_offset = static_cast<int>(Uniform(random, 0, 15));
    c.scales_offset = static_cast<int>(Uniform(random, 0, 3));
  }
}

std::vector<int64_t> RandomCounts(std::mt19937& random) {
  const int64_t experts = Uniform(random, 1, random() % 4 ? 6 : 60);
  const int64_t step = std::array<int64_t, 5>{128, 16, 4, 1, 1}[random() % 5];
  const int64_t most = experts > 6 ? 60 : random() % 2 ? 300 : 900;
  std::vector<int64_t> counts;
  for (int64_t i = 0; i < experts; ++i) counts.push_back(random() % 5 ? Uniform(random, 0, most) / step * step : 0);
  return counts;
}

int64_t Sum(const std::vector<int64_t>& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

std::string Describe(const InputCase& c) {
  std::ostringstream text;
  text << (c.type == InputType::kBf16 ? "bf16" : "fp8") << (c.pow_2_scales ? " pow2" : "") << " batch " << c.batch
       << " tokens " << c.tokens << " features " << c.features << " offsets x " << c.x_offset << " out " << c.out_offset
       << " scales " << c.scales_offset << " data " << static_cast<int>(c.data) << " seed " << c.seed
       << " first column " << c.first_column << (c.along_rows ? " along rows" : "");
  return text.str();
}

void AddInputArrays(const InputCase& c, const std::vector<int64_t>& rows, Memory& memory) {
  const bool fp8 = c.type == InputType::kFp8;
  const size_t pitch = fp8 ? CeilDiv(c.features, kBlock) : 0;  // of input scales
  const size_t all_rows = c.batch * c.tokens;
  const size_t row_bytes = c.features * c.ElementBytes(), scales_bytes = pitch * sizeof(float);
  AddInput(memory, "x", all_rows * row_bytes, c.x_offset * c.ElementBytes());
  AddInput(memory, "input_scales", all_rows * scales_bytes, fp8 ? c.scales_offset * sizeof(float) : 0);

  std::mt19937 random(c.seed);
  if (fp8) {
    FillFp8(c.data, random, all_rows * c.features, memory[kX].data());
  } else if (c.along_rows) {
    std::vector<uint16_t> columns(all_rows * c.features);
    FillBf16(c.data, random, c.features, all_rows, c.first_column, columns.data());
    for (size_t i = 0; i < columns.size(); ++i) {
      const size_t row = i % all_rows, feature = i / all_rows;
      std::memcpy(memory[kX].data() + row * row_bytes + feature * sizeof(uint16_t), &columns[i], sizeof(uint16_t));
    }
  } else {
    FillBf16(c.data, random, all_rows, c.features, c.first_column, reinterpret_cast<uint16_t*>(memory[kX].data()));
  }
  for (size_t i = 0; i < all_rows * pitch; ++i) {
    const float scale = RandomInputScale(c.data, random);
    std::memcpy(memory[kInputScales].data() + i * sizeof(float), &scale, sizeof(scale));
  }
  std::vector<Range> x, scales;
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    x.push_back({batch * c.tokens * row_bytes, rows[batch] * row_bytes});
    scales.push_back({batch * c.tokens * scales_bytes, rows[batch] * scales_bytes});
  }
  LimitReads(memory[kX], x);
  LimitReads(memory[kInputScales], scales);
}

Input MakeInput(const InputCase& c, const Addresses& addresses) {
  const bool fp8 = c.type == InputType::kFp8;
  return {c.type,        addresses[kX], fp8 ? reinterpret_cast<const float*>(addresses[kInputScales]) : nullptr,
          c.batch,       c.tokens,      c.features,
          c.pow_2_scales};
}

#ifdef JAX_TSQ_HANDLERS

InputShape MakeInputShape(Bytes& bytes, std::vector<int64_t>& counts) {
  InputShape shape;
  shape.fp8 = bytes.Flag();
  shape.batch = SmallBatch(bytes);
  shape.features = SmallSize(bytes);
  counts.resize(bytes.Next() % 6);
  for (int64_t& count : counts) shape.tokens += count = SmallSize(bytes);
  if (shape.tokens * shape.features > 30000) shape.features %= 9;
  return shape;
}

bool MakeHugeInput(Bytes& bytes, InputShape& shape) {
  if (bytes.Next() % 8 != 0) return false;
  shape.batch.resize(1, 1);
  MakeHuge(bytes, {&shape.batch[0], &shape.tokens, &shape.features});
  return true;
}

void AddInput(const InputShape& shape, std::vector<FrameBuffer> between, std::vector<FrameBuffer>& operands) {
  Add(operands, shape.fp8 ? kE4m3 : kBf16, shape.batch, {shape.tokens, shape.features});
  operands.insert(operands.end(), between.begin(), between.end());
  if (shape.fp8) Add(operands, kF32, shape.batch, {shape.tokens, Blocks(shape.features)});
}

InputShape InputShapeOf(const Frame& frame) {
  const FrameBuffer& x = frame.operands[0];
  return {x.type == kE4m3, Dims(x.dims.begin(), x.dims.end() - 2), x.dims[x.dims.size() - 2], x.dims.back()};
}

Input InputOf(const Frame& frame, bool pow_2_scales) {
  const InputShape shape = InputShapeOf(frame);
  Input input = {};
  input.type = shape.fp8 ? InputType::kFp8 : InputType::kBf16;
  input.x = frame.operands[0].data;
  if (shape.fp8) input.input_scales = static_cast<const float*>(frame.operands.back().data);
  input.batch = 1;
  for (const int64_t dim : shape.batch) input.batch *= dim;
  input.tokens = shape.tokens;
  input.features = shape.features;
  input.pow_2_scales = pow_2_scales;
  return input;
}

#endif

}  // namespace jax_tsq::harness
