// Calls a handler with memory of its own, and looks at what became of it.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "harness/calls.h"
#include "harness/operation.h"

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

using Memories = std::vector<Block>;

Memories Allocate(const std::vector<FrameBuffer>& buffers, int offset) {
  Memories blocks;
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

void Attach(std::vector<FrameBuffer>& buffers, const Memories& blocks, bool null_if_empty) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    buffers[i].data = null_if_empty && blocks[i].size() == 0 ? nullptr : blocks[i].data();
  }
}

bool IsEmpty(const Memories& blocks) {
  return std::all_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.size() == 0; });
}

// Handlers bind at their first call, which is XLA's when they are registered, and never fails for want of memory here.
bool BindHandlers() {
  for (const Operation& operation : Operations()) {
    Frame empty;
    Pool pool(Pool::Behaviour::kInline, 1);
    if (operation.calls.handler != nullptr) Invoke(operation.calls.handler, empty, pool, 0);
  }
  return true;
}

}  // namespace

void FillWithSum(std::initializer_list<Bytewise> inputs, void* result, int64_t bytes) {
  uint8_t sum = 0;
  for (const auto& [data, size] : inputs) {
    for (int64_t i = 0; i < size; ++i) sum += static_cast<const uint8_t*>(data)[i];
  }
  if (bytes > 0) std::memset(result, sum, bytes);
}

void ExpectSum(const Frame& frame) {
  uint8_t sum = 0;
  for (const FrameBuffer& operand : frame.operands) {
    for (size_t i = 0; i < *BytesOf(operand); ++i) sum += static_cast<const uint8_t*>(operand.data)[i];
  }
  std::memset(frame.results[0].data, sum, *BytesOf(frame.results[0]));
}

Verdict CheckCall(const Call& call, Pool* pool, std::string& fault) {
  [[maybe_unused]] static const bool bound = BindHandlers();
  Frame frame = call.frame;
  const CallRules& rules = call.operation->calls;
  bool right = IsRight(call);
  for (const auto* buffers : {&frame.operands, &frame.results}) {
    for (const FrameBuffer& buffer : *buffers) {
      if (right && !BytesOf(buffer).has_value()) return Verdict::kTooLarge;
    }
  }
  Memories operands, results = Allocate(frame.results, call.out_offset);
  std::mt19937 random(call.seed);
  for (size_t i = 0; i < frame.operands.size(); ++i) {
    const size_t offset = (i == 0 ? call.x_offset : call.scales_offset) * ElementBytes(frame.operands[i].type);
    operands.emplace_back(offset, BytesOf(frame.operands[i]).value_or(1));
    Fill(call, random, frame.operands[i], operands.back());
  }
  const Memories expected = Allocate(frame.results, call.out_offset);
  Attach(frame.operands, operands, call.null_if_empty);
  Attach(frame.results, results, call.null_if_empty);
  right = right && rules.is_aligned(frame);
  if (right && !IsEmpty(expected)) {
    Frame solved = frame;
    Attach(solved.operands, operands, false);
    Attach(solved.results, expected, false);
    rules.expect(solved);
  }

  Pool own(call.pool, call.threads);
  const Outcome outcome =
      Invoke(rules.handler, frame, pool != nullptr ? *pool : own, right ? call.failing_allocation : 0);
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
