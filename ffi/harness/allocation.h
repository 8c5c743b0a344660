// Memory that runs out when it is told to.

#ifndef JAX_TSQ_HARNESS_ALLOCATION_H_
#define JAX_TSQ_HARNESS_ALLOCATION_H_

#include <cstdint>

namespace jax_tsq::harness {

// Lets the n-th `new` of the calling thread from now on throw, once; with 0, none.
void FailAllocation(int64_t n);

// While it lives, none fails: for code that is XLA's in a real call.
class AllocationsSucceed {
 public:
  AllocationsSucceed();
  ~AllocationsSucceed();

 private:
  const int64_t left_;
};

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_ALLOCATION_H_
