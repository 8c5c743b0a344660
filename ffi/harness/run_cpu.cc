#include <algorithm>
#include <atomic>
#include <thread>

#include "commands.h"

namespace jax_tsq::harness {
namespace {

class ThreadExecutor : public Executor {
 public:
  int64_t NumThreads() const override { return std::max(2u, std::thread::hardware_concurrency()); }

  void Run(int64_t chunks, const std::function<void(int64_t)>& work) const override {
    std::atomic<int64_t> next = 0;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < std::min(NumThreads(), chunks); ++i) {
      threads.emplace_back([&] {
        for (int64_t chunk = next++; chunk < chunks; chunk = next++) work(chunk);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

const char* RunOnCpu(const Case& c, Memory& memory) {
  if (c.ragged) {
    RaggedOnCpu(MakeRagged(c, AddressesOf(memory)), ThreadExecutor());
  } else {
    SplitOnCpu(MakeSplit(c, AddressesOf(memory)), ThreadExecutor());
  }
  return nullptr;
}

}  // namespace jax_tsq::harness
