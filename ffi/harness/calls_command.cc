// harness calls: thousands of calls, one after the other or many at once.

#include <atomic>
#include <cstdio>
#include <functional>
#include <mutex>
#include <thread>

#include "calls.h"
#include "commands.h"

namespace jax_tsq::harness {
namespace {

class Tally {
 public:
  explicit Tally(const CallsOptions& options) : options_(options), random_(options.seed) {}

  // Makes and checks calls until none is left.
  void Work(Pool* pool) {
    for (;;) {
      Call call;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (made_ == options_.cases || failed_) return;
        ++made_;
        const std::vector<uint8_t> bytes = RandomBytes(random_);
        call = MakeCall(bytes.data(), bytes.size());
      }
      std::string fault;
      const Verdict verdict = CheckCall(call, pool, fault);
      const std::lock_guard<std::mutex> lock(mutex_);
      ++counts_[static_cast<int>(verdict)];
      if (verdict != Verdict::kFault) continue;
      failed_ = true;
      std::printf("FAULT %s\n  %s\n", fault.c_str(), Describe(call).c_str());
    }
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

}  // namespace

int Calls(const CallsOptions& options) {
  Tally tally(options);
  if (options.threads == 0) {
    tally.Work(nullptr);
    return tally.Report();
  }
  // XLA's devices share one pool, whose threads all may be inside handlers that wait for it.
  Pool pool(Pool::Behaviour::kThreads, options.threads);
  const int on_pool = 2 * options.threads;
  std::atomic<int> done = 0;
  std::function<void()> work = [&] {
    tally.Work(&pool);
    ++done;
  };
  for (int i = 0; i < on_pool; ++i) {
    pool.Schedule([](void* data) { (*static_cast<std::function<void()>*>(data))(); }, &work);
  }
  std::thread outside([&] { tally.Work(&pool); });
  outside.join();
  while (done < on_pool) std::this_thread::yield();
  return tally.Report();
}

}  // namespace jax_tsq::harness
