// The commands of the harness, and the kernels it was built with.

#ifndef JAX_TSQ_HARNESS_COMMANDS_H_
#define JAX_TSQ_HARNESS_COMMANDS_H_

#include <string>
#include <vector>

#include "core/cpu_level.h"
#include "harness/cases.h"

namespace jax_tsq::harness {

struct CheckOptions {
  bool cpu = true;
  bool cuda = true;
  int cases = 400;
  unsigned seed = 1;
  bool named = true;
  bool only_readable = false;
  int threads = 1;  // that check cases at once, on the GPU each with a stream of its own
};

struct CallsOptions {
  int cases = 2000;
  unsigned seed = 1;
  int threads = 0;  // of a pool that as many callers share; with 0, one caller and pools that misbehave
};

// Each returns an exit status.
int Check(const CheckOptions& options);
int CheckPairs(const CheckOptions& options, int step);
int Calls(const CallsOptions& options);
int CheckLarge();
int CheckWgrad(const std::vector<std::string>& names);
int Bench(const std::vector<std::string>& names);
int BenchWgrad(const std::vector<std::string>& names);

// Runs a case in copies of its memory and puts the outputs into `memory`. Returns null or a message. With
// `only_readable`, device memory that the kernel may not read is never written either.
const char* RunOnCpu(const Case& c, Memory& memory, CpuLevel level);
const char* RunOnCuda(const Case& c, Memory& memory, bool only_readable);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_COMMANDS_H_
