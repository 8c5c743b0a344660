// FFI calls made of bytes, right ones and corrupted ones, for the handlers.

#ifndef JAX_TSQ_HARNESS_CALLS_H_
#define JAX_TSQ_HARNESS_CALLS_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "harness/frame.h"

namespace jax_tsq::harness {

enum class Operation { kSplit, kRagged, kWgrad };

struct Call {
  Operation operation = Operation::kSplit;
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

// Whether the handler must accept the call, if its memory is aligned: by the shapes that the operations are specified
// to have, not by its code.
bool IsRight(const Call& call);
std::string Describe(const Call& call);

// What a call led to. A fault is a right call that fails or has wrong results, a wrong one that is accepted, or memory
// written that should not be.
enum class Verdict { kRight, kRefused, kOutOfMemory, kTooLarge, kFault };
// With a `pool` the call's own is not used.
Verdict CheckCall(const Call& call, Pool* pool, std::string& fault);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_CALLS_H_
