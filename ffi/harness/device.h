// Tests on a GPU.

#ifndef JAX_TSQ_HARNESS_DEVICE_H_
#define JAX_TSQ_HARNESS_DEVICE_H_

#include <string>

#include "harness/memory.h"
#include "harness/operation.h"

namespace jax_tsq::harness {

bool IsSm90();

// Runs a test on a stream of its own, in a copy of the memory, into which it puts the outputs. Returns null or a
// message. With `only_readable`, device memory that the kernel may not read is never written either.
const char* RunOnDevice(const Test& test, Memory& memory, bool only_readable);

// Records the first test in a graph and replays it with the data of each. Empty, or what is wrong.
std::string CheckGraph(const Tests& tests);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_DEVICE_H_
