// Calls a handler with memory of its own, and looks at what became of it.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>

#include "harness/calls.h"
#include "harness/oracle.h"
#include "wgrad/wgrad.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(SplitCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WgradCuda);

namespace jax_tsq {

// In place of the kernel, to see the handler's part: reads all that a kernel may read, and fills the result with what
// it has read.
const char* WgradOnCuda(const WgradProblem& p, Stream) {
  const int64_t blocks = p.tokens / kBlock;
  uint8_t sum = 0;
  const auto read = [&](const void* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) sum += static_cast<const uint8_t*>(data)[i];
  };
  read(p.x, p.batch * p.x_features * p.tokens);
  read(p.x_scales, p.batch * blocks * p.x_features * 4);
  read(p.dy, p.batch * p.dy_features * p.tokens);
  read(p.dy_scales, p.batch * blocks * p.dy_features * 4);
  read(p.group_sizes, p.batch * p.groups * 4);
  const int64_t bytes = p.batch * p.groups * p.x_features * p.dy_features * (p.dw_is_bf16 ? 2 : 4);
  if (bytes > 0) std::memset(p.dw, sum, bytes);
  return nullptr;
}

}  // namespace jax_tsq

namespace jax_tsq::harness {
namespace {

constexpr size_t kMostBytes = size_t{1} << 23;

size_t ElementBytes(XLA_FFI_DataType type) {
  if (type == XLA_FFI_DataType_BF16 || type == XLA_FFI_DataType_F16) return 2;
  return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_S32 ? 4 : 1;
}

// Nothing if no memory should be asked for it.
std::optional<size_t> BytesOf(const FrameBuffer& buffer) {
  const auto negative = [](int64_t dim) { return dim < 0; };
  if (std::any_of(buffer.dims.begin(), buffer.dims.end(), negative)) return std::nullopt;
  if (std::count(buffer.dims.begin(), buffer.dims.end(), 0) > 0) return 0;
  size_t bytes = ElementBytes(buffer.type);
  for (const int64_t dim : buffer.dims) {
    if (static_cast<uint64_t>(dim) > kMostBytes || (bytes *= dim) > kMostBytes) return std::nullopt;
  }
  return bytes;
}

// Memory that ends where the buffer ends, so that memory checkers see whatever goes past it.
class Block {
 public:
  Block(size_t offset, size_t bytes) : offset_(offset), bytes_(bytes), memory_(new uint8_t[offset + bytes]) {
    std::memset(memory_.get(), 0xFF, offset + bytes);
  }
  uint8_t* data() const { return memory_.get() + offset_; }
  size_t size() const { return bytes_; }
  bool SameAs(const Block& other) const {
    return std::memcmp(memory_.get(), other.memory_.get(), offset_ + bytes_) == 0;
  }

 private:
  size_t offset_, bytes_;
  std::unique_ptr<uint8_t[]> memory_;
};

using Blocks = std::vector<Block>;

Blocks Allocate(const std::vector<FrameBuffer>& buffers, int offset) {
  Blocks blocks;
  for (const FrameBuffer& buffer : buffers) {
    blocks.emplace_back(offset * ElementBytes(buffer.type), BytesOf(buffer).value_or(1));
  }
  return blocks;
}

void Fill(const Call& call, std::mt19937& random, const FrameBuffer& buffer, const Block& block) {
  constexpr int32_t kSizes[] = {0,   0,
                                1,   3,
                                127, 128,
                                129, 200,
                                -1,  256,
                                100, 130,
                                5,   std::numeric_limits<int32_t>::max(),
                                300, std::numeric_limits<int32_t>::min()};
  for (size_t i = 0; i < block.size(); ++i) block.data()[i] = static_cast<uint8_t>(random());
  if (buffer.type != XLA_FFI_DataType_S32 || call.any_sizes) return;
  for (size_t i = 0; i + 4 <= block.size(); i += 4) {
    std::memcpy(block.data() + i, &kSizes[random() % std::size(kSizes)], 4);
  }
}

void Attach(const Call& call, std::vector<FrameBuffer>& buffers, const Blocks& blocks) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    buffers[i].data = call.null_if_empty && blocks[i].size() == 0 ? nullptr : blocks[i].data();
  }
}

// What the native weight gradient asks of its memory.
bool IsAligned(const Frame& frame) {
  const auto aligned = [](const FrameBuffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.data) % 16 == 0; };
  return std::all_of(frame.operands.begin(), frame.operands.begin() + 4, aligned) && aligned(frame.results[0]);
}

// Puts the results of a right call into `results`.
void Expect(const Call& call, const Blocks& operands, const Blocks& results) {
  const Frame& frame = call.frame;
  if (call.operation == Operation::kWgrad) {
    uint8_t sum = 0;
    for (const Block& block : operands) sum = std::accumulate(block.data(), block.data() + block.size(), sum);
    std::memset(results[0].data(), sum, results[0].size());
    return;
  }
  const FrameBuffer& x = frame.operands[0];
  Input input = {};
  input.type = x.type == XLA_FFI_DataType_BF16 ? InputType::kBf16 : InputType::kFp8;
  input.x = operands[0].data();
  if (input.type == InputType::kFp8) input.input_scales = reinterpret_cast<const float*>(operands.back().data());
  input.batch = 1;
  for (size_t i = 0; i + 2 < x.dims.size(); ++i) input.batch *= x.dims[i];
  input.tokens = x.dims[x.dims.size() - 2];
  input.features = x.dims.back();
  input.pow_2_scales = frame.attributes.back().value;
  const auto floats = [](const Block& block) { return reinterpret_cast<float*>(block.data()); };
  if (call.operation == Operation::kRagged) {
    RaggedProblem problem = {};
    problem.input = input;
    problem.group_sizes = reinterpret_cast<const int32_t*>(operands[1].data());
    problem.groups = frame.operands[1].dims.back();
    problem.padded_tokens = frame.results[1].dims[frame.results[1].dims.size() - 2] * 128;
    problem.aligned = frame.attributes[0].value;
    problem.flat = frame.attributes[1].value;
    problem.values = results[0].data();
    problem.dequant_scales = floats(results[1]);
    problem.padded_sizes = reinterpret_cast<int32_t*>(results[2].data());
    RaggedOracle(problem);
    return;
  }
  SplitProblem problem = {input, {}};
  const size_t experts = frame.results.size() / 2;
  int64_t token = 0;
  for (size_t i = 0; i < experts; ++i) {
    const int64_t tokens = frame.results[i].dims.back();
    problem.experts.push_back({token, tokens, results[i].data(), floats(results[experts + i])});
    token += tokens;
  }
  SplitOracle(problem);
}

bool IsEmpty(const Blocks& blocks) {
  return std::all_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.size() == 0; });
}

}  // namespace

Verdict CheckCall(const Call& call, Pool* pool, std::string& fault) {
  Frame frame = call.frame;
  bool right = IsRight(call);
  for (const auto* buffers : {&frame.operands, &frame.results}) {
    for (const FrameBuffer& buffer : *buffers) {
      if (right && !BytesOf(buffer).has_value()) return Verdict::kTooLarge;
    }
  }
  Blocks operands, results = Allocate(frame.results, call.out_offset);
  std::mt19937 random(call.seed);
  for (size_t i = 0; i < frame.operands.size(); ++i) {
    const size_t offset = (i == 0 ? call.x_offset : call.scales_offset) * ElementBytes(frame.operands[i].type);
    operands.emplace_back(offset, BytesOf(frame.operands[i]).value_or(1));
    Fill(call, random, frame.operands[i], operands.back());
  }
  const Blocks expected = Allocate(frame.results, call.out_offset);
  Attach(call, frame.operands, operands);
  Attach(call, frame.results, results);
  if (right && call.operation == Operation::kWgrad) right = IsAligned(frame);
  if (right && !IsEmpty(expected)) Expect(call, operands, expected);

  Pool own(call.pool, call.threads);
  XLA_FFI_Handler* const handlers[] = {SplitCpu, RaggedCpu, WgradCuda};
  const Outcome outcome = Invoke(handlers[static_cast<int>(call.operation)], frame, pool != nullptr ? *pool : own,
                                 right ? call.failing_allocation : 0);
  if (outcome.code == XLA_FFI_Error_Code_INTERNAL && call.failing_allocation > 0) return Verdict::kOutOfMemory;
  if (right != (outcome.code == XLA_FFI_Error_Code_OK)) {
    fault = right ? "a right call was refused: " + outcome.message : "a wrong call was accepted";
    return Verdict::kFault;
  }
  if (!right && outcome.message.empty()) {
    fault = "an error without a message";
    return Verdict::kFault;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].SameAs(expected[i])) continue;
    fault = (right ? "wrong bytes in result " : "a refused call wrote to result ") + std::to_string(i);
    return Verdict::kFault;
  }
  return right ? Verdict::kRight : Verdict::kRefused;
}

}  // namespace jax_tsq::harness
