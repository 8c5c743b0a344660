// FFI calls made of bytes, right ones and corrupted ones, for the handlers.

#ifndef JAX_TSQ_HARNESS_CALLS_H_
#define JAX_TSQ_HARNESS_CALLS_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "harness/frame.h"

namespace jax_tsq::harness {

struct Operation;

// --- What an operation says of its calls -----------------------------------------------------------------------------

class Bytes;

struct CallRules {
  XLA_FFI_Handler* handler;
  // Any bytes make a call, most often a right one; without memory.
  Frame (*make)(Bytes& bytes);
  // Whether the handler must accept types, shapes and attributes, of which x has at least two dimensions and no more
  // elements than any array: by what the operation is specified to have, not by its code.
  bool (*is_right)(const Frame& frame);
  // Whether it must accept where arrays begin.
  bool (*is_aligned)(const Frame& frame);
  // Puts the results of a right call into the memory of its results.
  void (*expect)(const Frame& frame);
};

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

using Dims = std::vector<int64_t>;
using Wide = __int128;
inline constexpr XLA_FFI_DataType kE4m3 = XLA_FFI_DataType_F8E4M3FN;
inline constexpr XLA_FFI_DataType kBf16 = XLA_FFI_DataType_BF16;
inline constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32;
inline constexpr XLA_FFI_DataType kS32 = XLA_FFI_DataType_S32;

inline Wide Blocks(Wide tokens) { return (tokens + 127) / 128; }

int64_t SmallSize(Bytes& bytes);
// None to two dimensions.
Dims SmallBatch(Bytes& bytes);
// Gives one of several sizes a value that no memory holds, and another one 0: such arrays are empty, and so right.
void MakeHuge(Bytes& bytes, std::initializer_list<int64_t*> sizes);

// Adds a buffer of shape batch + dims.
void Add(std::vector<FrameBuffer>& buffers, XLA_FFI_DataType type, Dims batch, std::initializer_list<Wide> dims);
FrameAttribute Flag(std::string name, bool value);
// What kernels whose thread blocks stay on their multiprocessors take as their first attribute, most often a right one.
FrameAttribute Multiprocessors(Bytes& bytes);

// Whether operands and results have the same types and shapes.
bool SameBuffers(const Frame& a, const Frame& b);
// Whether these are all attributes, those before `first` aside, in alphabetical order as XLA has them.
bool HasFlags(const Frame& frame, const std::vector<std::string>& names, size_t first = 0);
bool HasMultiprocessors(const Frame& frame);
bool IsTooLarge(const Dims& dims);
// The last dimension, or -1.
int64_t Last(const FrameBuffer& buffer);
// Whether an array begins on a multiple of 16 bytes.
bool IsAligned(const FrameBuffer& buffer);
inline bool AnyAlignment(const Frame&) { return true; }

// In place of a kernel that only GPUs run: reads all that it may read, and fills its result with the sum of the bytes.
struct Bytewise {
  const void* data;
  int64_t bytes;
};
void FillWithSum(std::initializer_list<Bytewise> inputs, void* result, int64_t bytes);
// What calls of such operations lead to.
void ExpectSum(const Frame& frame);

// --- Calls -----------------------------------------------------------------------------------------------------------

struct Call {
  const Operation* operation = nullptr;
  Frame frame;  // without memory
  bool any_sizes = false;
  bool null_if_empty = false;
  int x_offset = 0, scales_offset = 0, out_offset = 0;  // in elements
  Pool::Behaviour pool = Pool::Behaviour::kInline;
  int64_t threads = 1;
  int64_t failing_allocation = 0;  // the n-th of a right call; 0 for none
  unsigned seed = 1;
};

// Any bytes make a call.
Call MakeCall(const uint8_t* bytes, size_t size);
std::vector<uint8_t> RandomBytes(std::mt19937& random);
// Whether the handler must accept the call, if its memory is aligned.
bool IsRight(const Call& call);
std::string Describe(const Call& call);

// What a call led to. A fault is a right call that fails or has wrong results, a wrong one that is accepted, or memory
// written that should not be.
enum class Verdict { kRight, kRefused, kOutOfMemory, kTooLarge, kFault };
// With a `pool` the call's own is not used.
Verdict CheckCall(const Call& call, Pool* pool, std::string& fault);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_CALLS_H_
