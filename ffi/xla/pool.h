// XLA's threads for CPU kernels.

#ifndef JAX_TSQ_XLA_POOL_H_
#define JAX_TSQ_XLA_POOL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "core/executor.h"
#include "xla/ffi/api/ffi.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

// Runs chunks on the caller and on XLA's pool. Several devices may share a pool whose threads all wait in handlers like
// this one, so the caller takes chunks itself and waits only for chunks that a running thread has taken.
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(ffi::ThreadPool& pool) : pool_(pool) {}

  int64_t NumThreads() const override { return std::max<int64_t>(1, pool_.num_threads()); }

  void Run(int64_t chunks, const std::function<void(int64_t)>& work) const override {
    if (chunks <= 0) return;
    auto state = std::make_shared<State>(chunks, work);
    // A task that starts late finds no chunk left, and touches nothing but the state that it shares.
    try {
      for (int64_t i = std::min(chunks, NumThreads()) - 1; i > 0; --i) {
        pool_.Schedule([state] { state->TakeChunks(); });
      }
    } catch (const std::bad_alloc&) {
      // Leaving now would leave tasks with a dangling `work`. Whoever is there does all.
    }
    state->TakeChunks();
    state->Wait();
  }

 private:
  struct State {
    State(int64_t chunks, const std::function<void(int64_t)>& work) : chunks(chunks), work(work) {}

    void TakeChunks() {
      for (int64_t i; (i = next.fetch_add(1)) < chunks;) {
        work(i);
        if (done.fetch_add(1) + 1 == chunks) {
          const std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_all();
        }
      }
    }

    void Wait() {
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, [this] { return done.load() == chunks; });
    }

    const int64_t chunks;
    const std::function<void(int64_t)>& work;  // lives until the last chunk is done
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };

  ffi::ThreadPool& pool_;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_POOL_H_
