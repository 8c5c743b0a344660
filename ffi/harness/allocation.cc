#include "harness/allocation.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace {
thread_local int64_t allocations_left = 0;
}

namespace jax_tsq::harness {
void FailAllocation(int64_t n) { allocations_left = n; }
AllocationsSucceed::AllocationsSucceed() : left_(std::exchange(allocations_left, 0)) {}
AllocationsSucceed::~AllocationsSucceed() { allocations_left = left_; }
}  // namespace jax_tsq::harness

void* operator new(size_t bytes) {
  if (allocations_left > 0 && --allocations_left == 0) throw std::bad_alloc();
  void* const memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
