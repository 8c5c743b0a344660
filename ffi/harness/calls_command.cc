// harness calls: thousands of calls, one after the other or many at once.

#include <atomic>
#include <cstdio>
#include <mutex>
#include <thread>

#include "harness/calls.h"
#include "harness/commands.h"

namespace jax_tsq::harness {
namespace {

class Tally {
 public:
  explicit Tally(const CallsOptions& options) : options_(options), random_(options.seed) {}

  // Makes and checks a call; false if none is left.
  bool Next(Pool* pool) {
    Call call;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (made_ == options_.cases || failed_) return false;
      ++made_;
      const std::vector<uint8_t> bytes = RandomBytes(random_);
      call = MakeCall(bytes.data(), bytes.size());
    }
    std::string fault;
    const Verdict verdict = CheckCall(call, pool, fault);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[static_cast<int>(verdict)];
    if (verdict == Verdict::kFault) {
      failed_ = true;
      std::printf("FAULT %s\n  %s\n", fault.c_str(), Describe(call).c_str());
    }
    return true;
  }

  int Report() const {
    const auto count = [&](Verdict verdict) { return counts_[static_cast<int>(verdict)]; };
    std::printf("%s: %d calls, %d right, %d refused, %d out of memory, %d left out\n", failed_ ? "FAILED" : "ok", made_,
                count(Verdict::kRight), count(Verdict::kRefused), count(Verdict::kOutOfMemory),
                count(Verdict::kTooLarge));
    return failed_;
  }

 private:
  const CallsOptions options_;
  std::mutex mutex_;
  std::mt19937 random_;
  int made_ = 0;
  int counts_[5] = {};
  bool failed_ = false;
};

// A caller on the pool: checks one call, and goes to the end of the queue behind the tasks of other callers.
struct PoolCaller {
  static void Run(void* data) {
    auto* caller = static_cast<PoolCaller*>(data);
    if (caller->tally.Next(&caller->pool)) {
      caller->pool.Schedule(Run, data);
    } else {
      ++caller->done;
    }
  }
  Tally& tally;
  Pool& pool;
  std::atomic<int>& done;
};

}  // namespace

int Calls(const CallsOptions& options) {
  Tally tally(options);
  if (options.threads == 0) {
    while (tally.Next(nullptr)) continue;
    return tally.Report();
  }
  // XLA's devices share one pool, whose threads all may be inside handlers that wait for it.
  std::atomic<int> done = 0;
  Pool pool(Pool::Behaviour::kThreads, options.threads);
  PoolCaller on_pool = {tally, pool, done};
  for (int i = 0; i < options.threads; ++i) pool.Schedule(PoolCaller::Run, &on_pool);
  std::vector<std::thread> outside;
  for (int i = 0; i < options.threads; ++i) {
    outside.emplace_back([&] {
      while (tally.Next(&pool)) continue;
    });
  }
  for (std::thread& thread : outside) thread.join();
  while (done < options.threads) std::this_thread::yield();
  return tally.Report();
}

}  // namespace jax_tsq::harness
