// The commands of the harness.

#ifndef JAX_TSQ_HARNESS_COMMANDS_H_
#define JAX_TSQ_HARNESS_COMMANDS_H_

#include <string>
#include <vector>

namespace jax_tsq::harness {

struct CheckOptions {
  bool cpu = true;
  bool cuda = true;
  int cases = 400;  // at random, of all operations together
  unsigned seed = 1;
  bool named = true;
  bool only_readable = false;
  int threads = 1;                 // that check cases at once, on the GPU each with a stream of its own
  std::vector<std::string> names;  // only "operation/case" that begin with one of them, if there are any
};

struct CallsOptions {
  int cases = 2000;
  unsigned seed = 1;
  int threads = 0;  // of a pool that as many callers share; with 0, one caller and pools that misbehave
};

// Each returns an exit status.
int Check(const CheckOptions& options);
int CheckPairs(const CheckOptions& options, int step);  // every so many of the pairs
int CheckLarge();
int Calls(const CallsOptions& options);
int Bench(const std::vector<std::string>& names);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_COMMANDS_H_
