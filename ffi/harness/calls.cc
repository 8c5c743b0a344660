// From bytes to calls, and which of them are right.

#include "harness/calls.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>

#include "core/limits.h"

namespace jax_tsq::harness {
namespace {

using Dims = std::vector<int64_t>;
using Wide = __int128;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr XLA_FFI_DataType kFp8 = XLA_FFI_DataType_F8E4M3FN;
constexpr XLA_FFI_DataType kBf16 = XLA_FFI_DataType_BF16;
constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32;
constexpr XLA_FFI_DataType kS32 = XLA_FFI_DataType_S32;

class Bytes {
 public:
  Bytes(const uint8_t* next, size_t size) : next_(next), end_(next + size) {}
  // 0 past the end
  unsigned Next() { return next_ == end_ ? 0 : *next_++; }
  bool Flag() { return Next() % 2; }
  template <class T, size_t n>
  T Pick(const T (&values)[n]) {
    return values[Next() % n];
  }

 private:
  const uint8_t *next_, *end_;
};

// What decides all shapes of a call.
struct Shape {
  bool fp8 = false;
  Dims batch;
  int64_t tokens = 0;
  int64_t features = 0;
  Dims counts;         // split
  int64_t groups = 0;  // ragged
  bool aligned = false;
  bool flat = false;
  int64_t outputs = 0;  // weight gradient
  bool bf16_result = false;
};

Wide Blocks(Wide tokens) { return (tokens + 127) / 128; }

void Add(std::vector<FrameBuffer>& buffers, XLA_FFI_DataType type, Dims batch, std::initializer_list<Wide> dims) {
  for (const Wide dim : dims) batch.push_back(static_cast<int64_t>(std::min<Wide>(dim, kMost)));
  buffers.push_back({type, batch, nullptr});
}

// The operands and results of a call, as the operation's specification has them.
Frame SplitFrame(const Shape& s) {
  Frame frame;
  Add(frame.operands, s.fp8 ? kFp8 : kBf16, s.batch, {s.tokens, s.features});
  if (s.fp8) Add(frame.operands, kF32, s.batch, {s.tokens, Blocks(s.features)});
  for (const int64_t count : s.counts) Add(frame.results, kFp8, s.batch, {s.features, count});
  for (const int64_t count : s.counts) Add(frame.results, kF32, s.batch, {Blocks(count), s.features});
  return frame;
}

Wide Padded(const Shape& s) {
  if (s.aligned) return Blocks(s.tokens) * 128;
  return (s.tokens + Wide{127} * std::min(s.groups, s.tokens)) / 128 * 128;
}

Frame RaggedFrame(const Shape& s) {
  Frame frame;
  Add(frame.operands, s.fp8 ? kFp8 : kBf16, s.batch, {s.tokens, s.features});
  Add(frame.operands, kS32, s.batch, {s.groups});
  if (s.fp8) Add(frame.operands, kF32, s.batch, {s.tokens, Blocks(s.features)});
  if (s.flat) {
    Add(frame.results, kFp8, s.batch, {s.features * Padded(s)});
  } else {
    Add(frame.results, kFp8, s.batch, {s.features, Padded(s)});
  }
  Add(frame.results, kF32, s.batch, {Padded(s) / 128, s.features});
  Add(frame.results, kS32, s.batch, {s.groups});
  return frame;
}

// `features` are those of x, `outputs` those of dy.
Frame WgradFrame(const Shape& s) {
  Frame frame;
  Add(frame.operands, kFp8, s.batch, {s.features, s.tokens});
  Add(frame.operands, kF32, s.batch, {s.tokens / 128, s.features});
  Add(frame.operands, kFp8, s.batch, {s.outputs, s.tokens});
  Add(frame.operands, kF32, s.batch, {s.tokens / 128, s.outputs});
  Add(frame.operands, kS32, s.batch, {s.groups});
  Add(frame.results, s.bf16_result ? kBf16 : kF32, s.batch, {s.groups, s.features, s.outputs});
  return frame;
}

FrameAttribute Flag(std::string name, bool value) {
  return {std::move(name), XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_PRED, value};
}

int64_t SmallSize(Bytes& bytes) {
  constexpr int64_t kSizes[] = {0, 1, 2, 7, 8, 9, 16, 33, 63, 64, 65, 127, 128, 129, 130, 200, 257};
  const unsigned byte = bytes.Next();
  return byte < 64 ? byte : kSizes[byte % std::size(kSizes)];
}

constexpr int64_t kOddSizes[] = {0,
                                 1,
                                 -1,
                                 127,
                                 (int64_t{1} << 31) - 128,
                                 int64_t{1} << 31,
                                 int64_t{1} << 32,
                                 int64_t{1} << 40,
                                 int64_t{1} << 59,
                                 int64_t{1} << 61,
                                 kMost,
                                 kMost - 127,
                                 std::numeric_limits<int64_t>::min()};

// A dimension that no memory holds, beside one of 0: such arrays are empty, and so right.
void MakeHuge(Bytes& bytes, Shape& s) {
  const int64_t huge = std::max<int64_t>(bytes.Pick(kOddSizes), 0);
  s.batch.resize(1, 1);
  int64_t* const dims[] = {&s.batch[0], &s.tokens, &s.features};
  const unsigned zero = bytes.Next() % 3;
  *dims[zero] = 0;
  *dims[(zero + 1 + bytes.Next() % 2) % 3] = huge;
  if (bytes.Flag()) s.groups = 0;
  if (!s.counts.empty()) {
    std::fill(s.counts.begin(), s.counts.end(), 0);
    s.counts[bytes.Next() % s.counts.size()] = s.tokens;
  }
}

Shape MakeShape(Bytes& bytes, Operation operation) {
  Shape s;
  s.fp8 = bytes.Flag();
  s.batch.resize(std::array{0, 0, 0, 1, 1, 2}[bytes.Next() % 6]);
  for (int64_t& dim : s.batch) dim = std::array{1, 2, 3, 0}[bytes.Next() % 4];
  s.features = SmallSize(bytes);
  s.counts.resize(bytes.Next() % 6);
  for (int64_t& count : s.counts) s.tokens += count = SmallSize(bytes);
  if (s.tokens * s.features > 30000) s.features %= 9;
  s.aligned = bytes.Flag();
  s.flat = bytes.Flag();
  s.groups = static_cast<int64_t>(s.counts.size());
  if (operation == Operation::kRagged) s.tokens += bytes.Next() % 8 ? 0 : 150;
  if (operation == Operation::kWgrad) {
    const int64_t multiple = bytes.Pick({8, 8, 4, 1});
    s.tokens = bytes.Next() % 8 ? s.tokens / 256 * 128 : s.tokens;
    s.features = s.features / 4 * multiple;
    s.outputs = SmallSize(bytes) / 4 * multiple;
    s.bf16_result = bytes.Flag();
    if (bytes.Next() % 16 == 0) s.groups = bytes.Flag() ? kMostProductGroups : kMostProductGroups + 1;
  }
  if (bytes.Next() % 8 == 0) MakeHuge(bytes, s);
  return s;
}

void CorruptBuffers(Bytes& bytes, std::vector<FrameBuffer>& buffers) {
  constexpr XLA_FFI_DataType kTypes[] = {kFp8,
                                         kBf16,
                                         kF32,
                                         kS32,
                                         XLA_FFI_DataType_U8,
                                         XLA_FFI_DataType_F16,
                                         XLA_FFI_DataType_S64,
                                         XLA_FFI_DataType_TOKEN,
                                         XLA_FFI_DataType_INVALID};
  const unsigned what = bytes.Next() % 8;
  if (buffers.empty()) {
    if (what == 0) buffers.push_back({bytes.Pick(kTypes), {SmallSize(bytes)}, nullptr});
    return;
  }
  const size_t index = bytes.Next() % buffers.size();
  FrameBuffer& buffer = buffers[index];
  const size_t position = buffer.dims.empty() ? 0 : bytes.Next() % buffer.dims.size();
  switch (what) {
    case 0:
      buffers.insert(buffers.begin() + index, FrameBuffer(buffer));
      break;
    case 1:
      buffers.erase(buffers.begin() + index);
      break;
    case 2:
      std::swap(buffer, buffers[bytes.Next() % buffers.size()]);
      break;
    case 3:
      buffer.type = bytes.Pick(kTypes);
      break;
    case 4:
      buffer.dims.insert(buffer.dims.begin() + position, bytes.Flag() ? 1 : SmallSize(bytes));
      break;
    case 5:
      if (bytes.Next() % 4 == 0) buffer.dims.clear();
      if (!buffer.dims.empty()) buffer.dims.erase(buffer.dims.begin() + position);
      break;
    case 6:
      if (!buffer.dims.empty()) buffer.dims[position] = bytes.Pick(kOddSizes);
      break;
    default:
      if (!buffer.dims.empty() && static_cast<uint64_t>(buffer.dims[position]) < 1000)
        buffer.dims[position] += bytes.Flag() ? 1 : -1;
  }
}

void CorruptRest(Bytes& bytes, Frame& frame) {
  const size_t index = bytes.Next() % std::max<size_t>(frame.attributes.size(), 1);
  switch (bytes.Next() % 6) {
    case 0:
      frame.stage = static_cast<XLA_FFI_ExecutionStage>(bytes.Next() % 4);
      break;
    case 1:
      frame.missing_bytes = bytes.Next() % 32;
      break;
    case 2:
      if (!frame.attributes.empty()) frame.attributes.erase(frame.attributes.begin() + index);
      break;
    case 3:
      if (!frame.attributes.empty()) frame.attributes[index].name += bytes.Flag() ? "s" : "";
      break;
    case 4:
      if (frame.attributes.empty()) break;
      frame.attributes[index].kind =
          bytes.Pick({XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_ARRAY});
      frame.attributes[index].type = bytes.Pick({XLA_FFI_DataType_PRED, XLA_FFI_DataType_S32, XLA_FFI_DataType_U8});
      break;
    default:
      frame.attributes.push_back(Flag("zzz", true));
  }
}

bool SameBuffers(const std::vector<FrameBuffer>& a, const std::vector<FrameBuffer>& b) {
  const auto same = [](const FrameBuffer& x, const FrameBuffer& y) { return x.type == y.type && x.dims == y.dims; };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
}

bool HasFlags(const Frame& frame, const std::vector<std::string>& names) {
  const auto is_flag = [](const FrameAttribute& attribute, const std::string& name) {
    return attribute.name == name && attribute.kind == XLA_FFI_AttrType_SCALAR &&
           attribute.type == XLA_FFI_DataType_PRED;
  };
  return std::equal(frame.attributes.begin(), frame.attributes.end(), names.begin(), names.end(), is_flag);
}

bool IsTooLarge(const Dims& dims) {
  Wide elements = 1;
  for (const int64_t dim : dims) {
    elements *= dim;
    if (dim < 0 || dim > kMostElements || elements > kMostElements) return true;
  }
  return false;
}

int64_t Last(const FrameBuffer& buffer) { return buffer.dims.empty() ? -1 : buffer.dims.back(); }

bool IsRightSplit(const Frame& frame, Shape s) {
  if (!HasFlags(frame, {"pow_2_scales"})) return false;
  Wide sum = 0;
  for (size_t i = 0; i < frame.results.size() / 2; ++i) {
    s.counts.push_back(Last(frame.results[i]));
    if (s.counts.back() < 0) return false;
    sum += s.counts.back();
  }
  const Frame right = SplitFrame(s);
  return sum == s.tokens && SameBuffers(frame.operands, right.operands) && SameBuffers(frame.results, right.results);
}

bool IsRightWgrad(const Frame& frame) {
  // XLA passes over attributes where a handler asks for none.
  if (frame.operands.size() != 5 || frame.results.size() != 1) return false;
  const FrameBuffer& dy = frame.operands[2];
  if (dy.dims.size() < 2) return false;
  const Dims& x = frame.operands[0].dims;
  Shape s;
  s.batch.assign(x.begin(), x.end() - 2);
  s.features = x[x.size() - 2];
  s.tokens = x.back();
  s.outputs = dy.dims[dy.dims.size() - 2];
  s.groups = Last(frame.operands[4]);
  s.bf16_result = frame.results[0].type == kBf16;
  const Frame right = WgradFrame(s);
  const int64_t multiple = s.bf16_result ? 8 : 4;
  return SameBuffers(frame.operands, right.operands) && SameBuffers(frame.results, right.results) &&
         !IsTooLarge(dy.dims) && !IsTooLarge(frame.operands[4].dims) && !IsTooLarge(frame.results[0].dims) &&
         s.tokens <= kMostTokens && s.features <= kMostProductFeatures && s.outputs <= kMostProductFeatures &&
         s.tokens % 128 == 0 && s.features % 4 == 0 && s.outputs % multiple == 0 && s.groups <= kMostProductGroups;
}

bool IsRightRagged(const Frame& frame, Shape s) {
  if (!HasFlags(frame, {"aligned", "flat", "pow_2_scales"}) || frame.operands.size() < 2) return false;
  s.aligned = frame.attributes[0].value;
  s.flat = frame.attributes[1].value;
  s.groups = Last(frame.operands[1]);
  if (s.groups < 0 || Padded(s) > kMostTokens || Padded(s) * s.features > kMostElements) return false;
  const Frame right = RaggedFrame(s);
  return SameBuffers(frame.operands, right.operands) && SameBuffers(frame.results, right.results);
}

}  // namespace

Call MakeCall(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Call call;
  call.operation = bytes.Pick({Operation::kSplit, Operation::kRagged, Operation::kWgrad});
  const Shape shape = MakeShape(bytes, call.operation);
  const bool pow_2_scales = bytes.Flag();
  switch (call.operation) {
    case Operation::kSplit:
      call.frame = SplitFrame(shape);
      call.frame.attributes = {Flag("pow_2_scales", pow_2_scales)};
      break;
    case Operation::kRagged:
      call.frame = RaggedFrame(shape);
      call.frame.attributes = {Flag("aligned", shape.aligned), Flag("flat", shape.flat),
                               Flag("pow_2_scales", pow_2_scales)};
      break;
    case Operation::kWgrad:
      call.frame = WgradFrame(shape);
  }
  call.any_sizes = bytes.Flag();
  call.null_if_empty = bytes.Flag();
  call.x_offset = bytes.Flag() ? bytes.Next() % 16 : 0;
  call.scales_offset = bytes.Flag() ? bytes.Next() % 16 : 0;
  call.out_offset = bytes.Flag() ? bytes.Next() % 16 : 0;
  call.pool = bytes.Pick({Pool::Behaviour::kInline, Pool::Behaviour::kLate, Pool::Behaviour::kFails});
  call.threads = bytes.Pick({0, 1, 2, 3, 8, -1, 100});
  call.seed = bytes.Next();
  // XLA's own code for tasks that its pool does not take cannot stand it.
  const bool may_fail = call.pool != Pool::Behaviour::kFails && bytes.Next() % 8 == 0;
  call.failing_allocation = may_fail ? bytes.Next() % 40 : 0;
  for (unsigned left = bytes.Next() % 4; left > 0; --left) {
    const unsigned what = bytes.Next() % 5;
    if (what < 2) CorruptBuffers(bytes, call.frame.operands);
    if (what == 2 || what == 3) CorruptBuffers(bytes, call.frame.results);
    if (what == 4) CorruptRest(bytes, call.frame);
  }
  return call;
}

std::vector<uint8_t> RandomBytes(std::mt19937& random) {
  std::vector<uint8_t> bytes(random() % 96);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

bool IsRight(const Call& call) {
  const Frame& frame = call.frame;
  if (frame.stage != XLA_FFI_ExecutionStage_EXECUTE || frame.missing_bytes != 0) return false;
  if (frame.operands.empty() || frame.operands[0].dims.size() < 2) return false;
  const FrameBuffer& x = frame.operands[0];
  if (IsTooLarge(x.dims)) return false;
  if (call.operation == Operation::kWgrad) return IsRightWgrad(frame);
  Shape s;
  s.fp8 = x.type == kFp8;
  s.batch.assign(x.dims.begin(), x.dims.end() - 2);
  s.tokens = x.dims[x.dims.size() - 2];
  s.features = x.dims.back();
  return call.operation == Operation::kRagged ? IsRightRagged(frame, s) : IsRightSplit(frame, s);
}

std::string Describe(const Call& call) {
  std::ostringstream text;
  text << std::array{"split", "ragged", "wgrad"}[static_cast<int>(call.operation)];
  const auto add = [&](const char* name, const std::vector<FrameBuffer>& buffers) {
    text << ' ' << name;
    for (const FrameBuffer& buffer : buffers) {
      text << ' ' << buffer.type << '[';
      for (size_t i = 0; i < buffer.dims.size(); ++i) text << (i ? "," : "") << buffer.dims[i];
      text << ']';
    }
  };
  add("operands", call.frame.operands);
  add("results", call.frame.results);
  for (const FrameAttribute& attribute : call.frame.attributes) {
    text << ' ' << attribute.name << " kind " << attribute.kind << " type " << attribute.type << " = "
         << attribute.value;
  }
  text << " stage " << call.frame.stage << " missing bytes " << call.frame.missing_bytes << " offsets x "
       << call.x_offset << " scales " << call.scales_offset << " out " << call.out_offset << " threads " << call.threads
       << " pool " << static_cast<int>(call.pool) << " failing allocation " << call.failing_allocation << " seed "
       << call.seed;
  return text.str();
}

}  // namespace jax_tsq::harness
