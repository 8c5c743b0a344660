// How CPU kernels spread their work: they name the chunks, the caller owns the threads.

#ifndef JAX_TSQ_CORE_EXECUTOR_H_
#define JAX_TSQ_CORE_EXECUTOR_H_

#include <cstdint>
#include <functional>

namespace jax_tsq {

class Executor {
 public:
  virtual ~Executor() = default;
  // Threads that may run at once, at least 1: a hint for the size of chunks.
  virtual int64_t NumThreads() const = 0;
  // Calls work(0) ... work(chunks - 1), each once, in any order and on any threads; returns when all are done.
  virtual void Run(int64_t chunks, const std::function<void(int64_t)>& work) const = 0;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_EXECUTOR_H_
