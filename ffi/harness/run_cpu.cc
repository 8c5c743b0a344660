#include <algorithm>
#include <atomic>
#include <thread>

#include "harness/commands.h"

namespace jax_tsq::harness {
namespace {

class ThreadExecutor : public Executor {
 public:
  explicit ThreadExecutor(int64_t threads) : threads_(threads) {}

  int64_t NumThreads() const override { return threads_; }

  void Run(int64_t chunks, const std::function<void(int64_t)>& work) const override {
    std::atomic<int64_t> next = 0;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < std::min(threads_, chunks); ++i) {
      threads.emplace_back([&] {
        for (int64_t chunk = next++; chunk < chunks; chunk = next++) work(chunk);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  const int64_t threads_;
};

}  // namespace

// The number of threads, on which no byte depends, differs from case to case.
const char* RunOnCpu(const Case& c, Memory& memory, CpuLevel level) {
  const ThreadExecutor executor(std::array<int64_t, 5>{1, 2, 3, 8, 33}[c.seed % 5]);
  if (c.ragged) {
    RaggedOnCpu(MakeRagged(c, AddressesOf(memory)), executor, level);
  } else {
    SplitOnCpu(MakeSplit(c, AddressesOf(memory)), executor, level);
  }
  return nullptr;
}

}  // namespace jax_tsq::harness
