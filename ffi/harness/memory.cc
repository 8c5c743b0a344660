#include "harness/memory.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace jax_tsq::harness {
namespace {

std::string Mismatch(const Array& array, size_t byte, unsigned expected) {
  char text[200];
  std::snprintf(text, sizeof(text), "byte %lld of %zu of %s: expected 0x%02X, got 0x%02X",
                static_cast<long long>(byte) - static_cast<long long>(array.start), array.size(), array.name.c_str(),
                expected, array.bytes[byte]);
  return text;
}

}  // namespace

Addresses AddressesOf(Memory& memory) {
  Addresses addresses;
  for (Array& array : memory) addresses.push_back(array.data());
  return addresses;
}

Array& AddInput(Memory& memory, std::string name, size_t bytes, size_t offset) {
  memory.push_back(
      {std::move(name), false, offset, std::vector<uint8_t>(offset + bytes, kUntouched), {Range{0, bytes}}});
  return memory.back();
}

void AddOutput(Memory& memory, std::string name, size_t bytes, size_t offset) {
  const size_t start = kGuard + offset;
  memory.push_back({std::move(name), true, start, std::vector<uint8_t>(start + bytes + kGuard, kUntouched), {}});
}

void LimitReads(Array& array, std::vector<Range> ranges) {
  const std::vector<uint8_t> filled = array.bytes;
  std::fill(array.bytes.begin(), array.bytes.end(), kUntouched);
  for (const Range& range : ranges) {
    const auto from = filled.begin() + array.start + range.offset;
    std::copy(from, from + range.bytes, array.bytes.begin() + array.start + range.offset);
  }
  array.readable = std::move(ranges);
}

std::string FindDifference(const Memory& expected, const Memory& got) {
  for (size_t i = 0; i < got.size(); ++i) {
    const auto [want, have] = std::mismatch(expected[i].bytes.begin(), expected[i].bytes.end(), got[i].bytes.begin());
    if (have != got[i].bytes.end()) return Mismatch(got[i], have - got[i].bytes.begin(), *want);
  }
  return "";
}

std::string FindBrokenGuard(const Memory& got) {
  for (const Array& array : got) {
    if (!array.is_output) continue;
    for (size_t i = 0; i < array.bytes.size(); ++i) {
      if (i == array.start) i += array.size();
      if (array.bytes[i] != kUntouched) return Mismatch(array, i, kUntouched);
    }
  }
  return "";
}

}  // namespace jax_tsq::harness
