// Every output byte of every kernel against the oracle, guards included.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <functional>
#include <thread>

#include "core/numerics.h"
#include "harness/commands.h"
#include "harness/operation.h"
#ifdef JAX_TSQ_CUDA
#include "harness/device.h"
#endif

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

// Puts the outputs of test number `index` into `memory`; returns null or a message.
struct Kernel {
  std::string name;
  std::function<const char*(const Test&, size_t index, Memory& memory)> run;
};

// Those that this build has and this machine can run.
std::vector<Kernel> KernelsOf(const Operation& operation, const CheckOptions& options) {
  std::vector<Kernel> kernels;
  constexpr std::pair<CpuLevel, const char*> kLevels[] = {
      {CpuLevel::kPortable, "CPU, portable"}, {CpuLevel::kAvx2, "CPU, AVX2"}, {CpuLevel::kAvx512, "CPU, AVX-512"}};
  for (const auto& [level, name] : kLevels) {
    if (!options.cpu || !operation.on_cpu || !CanRun(level)) continue;
    kernels.push_back({name, [level = level](const Test& test, size_t index, Memory& memory) {
                         // No byte depends on the number of threads.
                         const ThreadExecutor executor(std::array<int64_t, 5>{1, 2, 3, 8, 33}[index % 5]);
                         return test.RunOnCpu(AddressesOf(memory), executor, level);
                       }});
  }
#ifdef JAX_TSQ_CUDA
  if (options.cuda && !(operation.needs_sm90 && !IsSm90())) {
    const bool only_readable = options.only_readable;
    kernels.push_back({"CUDA", [only_readable](const Test& test, size_t, Memory& memory) {
                         return RunOnDevice(test, memory, only_readable);
                       }});
  }
#endif
  return kernels;
}

// A test and what it is for.
struct Task {
  const Operation* operation;
  const Test* test;
  const std::vector<Kernel>* kernels;
};

bool Complain(const char* what, const Task& task, const std::string& kernel, const std::string& message) {
  std::printf("%s %s '%s', %s: %s\n  %s\n", what, task.operation->name.c_str(), task.test->name().c_str(),
              kernel.c_str(), message.c_str(), task.test->Describe().c_str());
  return false;
}

bool CheckTask(const Task& task, size_t index) {
  const Memory initial = task.test->MakeMemory();
  Memory expected = initial;
  task.test->Expect(AddressesOf(expected));
  for (const Kernel& kernel : *task.kernels) {
    Memory memory = initial;
    if (const char* error = kernel.run(*task.test, index, memory)) return Complain("ERROR", task, kernel.name, error);
    const std::string difference = task.test->Compare(expected, memory);
    if (!difference.empty()) return Complain("MISMATCH", task, kernel.name, difference);
    if (task.test->IsExact()) continue;
    Memory again = initial;
    kernel.run(*task.test, index, again);
    const std::string other = FindDifference(memory, again);
    if (!other.empty()) return Complain("OTHER BYTES in a second run of", task, kernel.name, other);
  }
  return true;
}

// Checks tasks on as many threads as the options ask for.
bool CheckAll(const CheckOptions& options, const std::vector<Task>& tasks) {
  std::atomic<size_t> next = 0;
  std::atomic<bool> ok = true;
  const auto work = [&] {
    for (size_t i = next++; ok && i < tasks.size(); i = next++) {
      if (CheckTask(tasks[i], i)) continue;
      std::printf("FAILED at case %zu of %zu\n", i + 1, tasks.size());
      ok = false;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < options.threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  return ok;
}

// What an operation is checked with.
struct Suite {
  const Operation* operation;
  std::vector<Kernel> kernels;
  Tests tests;
};

// Adds to `checked` how many cases there were.
bool CheckSuites(const CheckOptions& options, const std::vector<Suite>& suites, size_t& checked) {
  std::vector<Task> tasks;
  for (const Suite& suite : suites) {
    for (const auto& test : suite.tests) tasks.push_back({suite.operation, test.get(), &suite.kernels});
  }
  if (!CheckAll(options, tasks)) return false;
  for (const Suite& suite : suites) {
    if (suite.tests.empty()) continue;
    std::printf("ok: %zu cases of %s, %zu kernels\n", suite.tests.size(), suite.operation->name.c_str(),
                suite.kernels.size());
  }
  checked += tasks.size();
  return true;
}

std::vector<Suite> MakeSuites(const CheckOptions& options) {
  std::vector<Suite> suites;
  for (const Operation& operation : Operations()) {
    std::vector<Kernel> kernels = KernelsOf(operation, options);
    if (kernels.empty()) {
      std::printf("skipped: %s, which has no kernel here\n", operation.name.c_str());
    } else {
      suites.push_back({&operation, std::move(kernels), {}});
    }
  }
  return suites;
}

// The same for graphs.
bool CheckGraphs([[maybe_unused]] const CheckOptions& options, [[maybe_unused]] const std::vector<Suite>& suites,
                 [[maybe_unused]] size_t& checked) {
#ifdef JAX_TSQ_CUDA
  for (const Suite& suite : suites) {
    const std::string& name = suite.operation->name;
    const Tests tests = suite.operation->replayed();
    if (!options.cuda || !options.named || tests.empty() || !IsChosen(name + "/graph", options.names)) continue;
    const std::string difference = CheckGraph(tests);
    if (!difference.empty()) {
      std::printf("FAILED: a graph of %s: %s\n", name.c_str(), difference.c_str());
      return false;
    }
    std::printf("ok: a graph of %s\n", name.c_str());
    ++checked;
  }
#endif
  return true;
}

int Status(bool ok, size_t checked) {
  if (!ok) return 1;
  if (checked > 0) return 0;
  std::fprintf(stderr, "harness: no kernel or no case that was asked for\n");
  return 2;
}

}  // namespace

int Check(const CheckOptions& options) {
  std::vector<Suite> suites = MakeSuites(options);
  std::vector<Suite*> with_random;
  for (Suite& suite : suites) {
    const auto chosen = [&](const std::string& test) {
      return IsChosen(suite.operation->name + "/" + test, options.names);
    };
    for (auto& test : options.named ? suite.operation->named() : Tests()) {
      if (chosen(test->name())) suite.tests.push_back(std::move(test));
    }
    if (suite.operation->random && chosen("random")) with_random.push_back(&suite);
  }
  std::mt19937 random(options.seed);
  for (int i = 0; i < options.cases && !with_random.empty(); ++i) {
    Suite& suite = *with_random[i % with_random.size()];
    suite.tests.push_back(suite.operation->random(random));
  }
  size_t checked = 0;
  const bool ok = CheckSuites(options, suites, checked) && CheckGraphs(options, suites, checked);
  return Status(ok, checked);
}

int CheckPairs(const CheckOptions& options, int step) {
  std::vector<Suite> suites = MakeSuites(options);
  for (Suite& suite : suites) {
    Tests all = suite.operation->pairs();
    for (size_t i = 0; i < all.size(); ++i) {
      if (i / 2 % step == 0) suite.tests.push_back(std::move(all[i]));  // with and without pow_2_scales
    }
  }
  size_t checked = 0;
  const bool ok = CheckSuites(options, suites, checked);
  return Status(ok, checked);
}

int CheckLarge() {
  int status = 0;
#ifdef JAX_TSQ_CUDA
  for (const Operation& operation : Operations()) {
    if (!operation.large) continue;
    const std::string difference = operation.large();
    std::printf("%s: large %s %s\n", difference.empty() ? "ok" : "FAILED", operation.name.c_str(), difference.c_str());
    if (!difference.empty()) status = 1;
  }
#endif
  return status;
}

}  // namespace jax_tsq::harness
