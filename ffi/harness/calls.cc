#include "harness/calls.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <utility>

#include "core/limits.h"
#include "harness/operation.h"

namespace jax_tsq::harness {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

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

void CorruptBuffers(Bytes& bytes, std::vector<FrameBuffer>& buffers) {
  constexpr XLA_FFI_DataType kTypes[] = {kE4m3,
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

}  // namespace

int64_t SmallSize(Bytes& bytes) {
  constexpr int64_t kSizes[] = {0, 1, 2, 7, 8, 9, 16, 33, 63, 64, 65, 127, 128, 129, 130, 200, 257};
  const unsigned byte = bytes.Next();
  return byte < 64 ? byte : kSizes[byte % std::size(kSizes)];
}

Dims SmallBatch(Bytes& bytes) {
  Dims batch(std::array{0, 0, 0, 1, 1, 2}[bytes.Next() % 6]);
  for (int64_t& dim : batch) dim = std::array{1, 2, 3, 0}[bytes.Next() % 4];
  return batch;
}

void MakeHuge(Bytes& bytes, std::initializer_list<int64_t*> sizes) {
  const size_t count = sizes.size();
  const size_t zero = bytes.Next() % count;
  *sizes.begin()[zero] = 0;
  *sizes.begin()[(zero + 1 + bytes.Next() % (count - 1)) % count] = std::max<int64_t>(bytes.Pick(kOddSizes), 0);
}

void Add(std::vector<FrameBuffer>& buffers, XLA_FFI_DataType type, Dims batch, std::initializer_list<Wide> dims) {
  for (const Wide dim : dims) batch.push_back(static_cast<int64_t>(std::min<Wide>(dim, kMost)));
  buffers.push_back({type, batch, nullptr});
}

FrameAttribute Flag(std::string name, bool value) {
  return {std::move(name), XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_PRED, value};
}

FrameAttribute Multiprocessors(Bytes& bytes) {
  return {"multiprocessors", XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_S64, bytes.Pick({0, 0, 0, 0, 1, 132, 1000, -1})};
}

bool SameBuffers(const Frame& a, const Frame& b) {
  const auto same = [](const FrameBuffer& x, const FrameBuffer& y) { return x.type == y.type && x.dims == y.dims; };
  return std::equal(a.operands.begin(), a.operands.end(), b.operands.begin(), b.operands.end(), same) &&
         std::equal(a.results.begin(), a.results.end(), b.results.begin(), b.results.end(), same);
}

bool HasFlags(const Frame& frame, const std::vector<std::string>& names, size_t first) {
  const auto is_flag = [](const FrameAttribute& attribute, const std::string& name) {
    return attribute.name == name && attribute.kind == XLA_FFI_AttrType_SCALAR &&
           attribute.type == XLA_FFI_DataType_PRED;
  };
  return first <= frame.attributes.size() &&
         std::equal(frame.attributes.begin() + first, frame.attributes.end(), names.begin(), names.end(), is_flag);
}

bool HasMultiprocessors(const Frame& frame) {
  if (frame.attributes.empty()) return false;
  const FrameAttribute& first = frame.attributes[0];
  return first.name == "multiprocessors" && first.kind == XLA_FFI_AttrType_SCALAR &&
         first.type == XLA_FFI_DataType_S64 && first.value >= 0;
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

bool IsAligned(const FrameBuffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.data) % 16 == 0; }

Call MakeCall(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Call call;
  call.operation = &Operations()[bytes.Next() % Operations().size()];
  call.frame = call.operation->calls.make(bytes);
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
  if (frame.operands.empty() || frame.operands[0].dims.size() < 2 || IsTooLarge(frame.operands[0].dims)) return false;
  return call.operation->calls.is_right(frame);
}

std::string Describe(const Call& call) {
  std::ostringstream text;
  text << call.operation->name;
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
