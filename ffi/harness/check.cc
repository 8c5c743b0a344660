// Every output byte of every kernel against the oracle, guards included.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <thread>

#include "core/numerics.h"
#include "harness/commands.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

bool Same(const Case& c, const char* kernel, const Memory& expected, const Memory& got) {
  for (int i = 0; i < kBuffers; ++i) {
    const auto [want, have] = std::mismatch(expected[i].begin(), expected[i].end(), got[i].begin());
    if (want == expected[i].end()) continue;
    std::printf("MISMATCH %s, byte %td of %zu of %s: expected 0x%02X, got 0x%02X\n  %s\n", kernel,
                want - expected[i].begin(), expected[i].size(), kBufferNames[i], *want, *have, Describe(c).c_str());
    return false;
  }
  return true;
}

struct Kernel {
  std::string name;
  std::function<const char*(const Case&, Memory&)> run;
};

// Those that this build has and this machine can run.
std::vector<Kernel> Kernels(const CheckOptions& options) {
  constexpr std::pair<CpuLevel, const char*> kLevels[] = {
      {CpuLevel::kPortable, "CPU, portable"}, {CpuLevel::kAvx2, "CPU, AVX2"}, {CpuLevel::kAvx512, "CPU, AVX-512"}};
  std::vector<Kernel> kernels;
  for (const auto& [level, name] : kLevels) {
    if (!options.cpu || !CanRun(level)) continue;
    kernels.push_back({name, [level = level](const Case& c, Memory& memory) { return RunOnCpu(c, memory, level); }});
  }
#ifdef JAX_TSQ_CUDA
  const bool only_readable = options.only_readable;
  if (options.cuda) {
    kernels.push_back(
        {"CUDA", [only_readable](const Case& c, Memory& memory) { return RunOnCuda(c, memory, only_readable); }});
  }
#endif
  return kernels;
}

bool CheckCase(const std::vector<Kernel>& kernels, const Case& c) {
  const Memory initial = MakeMemory(c);
  Memory expected = initial;
  if (c.ragged) {
    RaggedOracle(MakeRagged(c, AddressesOf(expected)));
  } else {
    SplitOracle(MakeSplit(c, AddressesOf(expected)));
  }
  bool ok = true;
  for (const Kernel& kernel : kernels) {
    Memory memory = initial;
    if (const char* error = kernel.run(c, memory)) {
      std::printf("ERROR %s: %s\n  %s\n", kernel.name.c_str(), error, Describe(c).c_str());
      ok = false;
    } else {
      ok &= Same(c, kernel.name.c_str(), expected, memory);
    }
  }
  return ok;
}

// Checks count cases on as many threads as the options ask for.
int CheckAll(const CheckOptions& options, size_t count, const std::function<Case(size_t)>& case_at) {
  const std::vector<Kernel> kernels = Kernels(options);
  if (kernels.empty()) {
    std::fprintf(stderr, "harness: built without the kernels that were asked for\n");
    return 2;
  }
  std::atomic<size_t> next = 0;
  std::atomic<bool> ok = true;
  const auto work = [&] {
    for (size_t i = next++; ok && i < count; i = next++) {
      if (CheckCase(kernels, case_at(i))) continue;
      std::printf("FAILED at case %zu of %zu\n", i + 1, count);
      ok = false;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < options.threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (ok) std::printf("ok: %zu cases, %zu kernels\n", count, kernels.size());
  return ok ? 0 : 1;
}

}  // namespace

int Check(const CheckOptions& options) {
  std::vector<Case> cases;
  if (options.named) cases = NamedCases();
  std::mt19937 random(options.seed);
  for (int i = 0; i < options.cases; ++i) cases.push_back(RandomCase(random));
  const int status = CheckAll(options, cases.size(), [&](size_t i) { return cases[i]; });
#ifdef JAX_TSQ_CUDA
  if (status == 0 && options.cuda && options.named) return CheckWgrad({});
#endif
  return status;
}

// All elements beside all block maxima: what the conversion of a bfloat16 depends on. With a step, only every so many
// cases of them.
int CheckPairs(const CheckOptions& options, int step) {
  const size_t cases = CountPairCases();
  std::printf("%zu of %zu cases, each with and without pow_2_scales\n", CeilDiv(cases, step), cases);
  return CheckAll(options, 2 * CeilDiv(cases, step), [&](size_t i) { return PairCase(i / 2 * step, i % 2 != 0); });
}

}  // namespace jax_tsq::harness
