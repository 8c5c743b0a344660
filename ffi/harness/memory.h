// The memory of a problem, made so that it shows what a kernel reads and writes beside its arrays.

#ifndef JAX_TSQ_HARNESS_MEMORY_H_
#define JAX_TSQ_HARNESS_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace jax_tsq::harness {

// What nobody has written: neither a float8 result nor a scale nor a size. In inputs, what nobody may read.
inline constexpr uint8_t kUntouched = 0xFF;
// Bytes around an output.
inline constexpr size_t kGuard = 256;

struct Range {
  size_t offset;
  size_t bytes;
};

struct Array {
  std::string name;
  bool is_output;
  size_t start;                 // of the array in its allocation
  std::vector<uint8_t> bytes;   // of the allocation
  std::vector<Range> readable;  // what a kernel may read of an input, counted from `start`

  uint8_t* data() { return bytes.data() + start; }
  size_t size() const { return bytes.size() - start - (is_output ? kGuard : 0); }
};

using Memory = std::vector<Array>;
// The first byte of each array, on the host or on a device.
using Addresses = std::vector<uint8_t*>;

Addresses AddressesOf(Memory& memory);

// Adds an input that starts `offset` bytes after an aligned address and ends where its allocation ends, so that memory
// checkers see a read past it. All of it may be read.
Array& AddInput(Memory& memory, std::string name, size_t bytes, size_t offset = 0);

// Adds an output between guards.
void AddOutput(Memory& memory, std::string name, size_t bytes, size_t offset = 0);

template <class T>
void AddInput(Memory& memory, std::string name, const std::vector<T>& data) {
  Array& array = AddInput(memory, std::move(name), data.size() * sizeof(T));
  if (!data.empty()) std::memcpy(array.data(), data.data(), data.size() * sizeof(T));
}

// Lets a kernel read these ranges of an input only, and puts garbage into the rest.
void LimitReads(Array& array, std::vector<Range> ranges);

// Empty where all bytes are the same, or else where the first other one is.
std::string FindDifference(const Memory& expected, const Memory& got);
// The same for what surrounds outputs.
std::string FindBrokenGuard(const Memory& got);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_MEMORY_H_
