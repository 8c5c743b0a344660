// Every output byte of every kernel against the oracle, guards included.

#include <algorithm>
#include <cstdio>

#include "commands.h"
#include "oracle.h"

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

bool CheckCase(const CheckOptions& options, const Case& c) {
  const Memory initial = MakeMemory(c);
  Memory expected = initial;
  if (c.ragged) {
    RaggedOracle(MakeRagged(c, AddressesOf(expected)));
  } else {
    SplitOracle(MakeSplit(c, AddressesOf(expected)));
  }
  const auto run = [&](const char* kernel, auto&& kernel_run) {
    Memory memory = initial;
    if (const char* error = kernel_run(memory)) {
      std::printf("ERROR %s: %s\n  %s\n", kernel, error, Describe(c).c_str());
      return false;
    }
    return Same(c, kernel, expected, memory);
  };
  bool ok = true;
  if (options.cpu) ok &= run("CPU", [&](Memory& memory) { return RunOnCpu(c, memory); });
#ifdef JAX_TSQ_CUDA
  if (options.cuda) ok &= run("CUDA", [&](Memory& memory) { return RunOnCuda(c, memory, options.only_readable); });
#endif
  return ok;
}

}  // namespace

int Check(const CheckOptions& options) {
  int kernels = options.cpu;
#ifdef JAX_TSQ_CUDA
  kernels += options.cuda;
#endif
  if (kernels == 0) {
    std::fprintf(stderr, "harness: built without the kernels that were asked for\n");
    return 2;
  }
  std::vector<Case> cases;
  if (options.named) cases = NamedCases();
  std::mt19937 random(options.seed);
  for (int i = 0; i < options.cases; ++i) cases.push_back(RandomCase(random));
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!CheckCase(options, cases[i])) {
      std::printf("FAILED at case %zu of %zu\n", i + 1, cases.size());
      return 1;
    }
  }
  std::printf("ok: %zu cases, %d kernels\n", cases.size(), kernels);
#ifdef JAX_TSQ_CUDA
  if (options.cuda && options.named) return CheckWgrad({});
#endif
  return 0;
}

}  // namespace jax_tsq::harness
