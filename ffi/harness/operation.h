// What the harness has to know of an operation. ops/<stem>.cc registers it.

#ifndef JAX_TSQ_HARNESS_OPERATION_H_
#define JAX_TSQ_HARNESS_OPERATION_H_

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"
#include "harness/memory.h"

#ifdef JAX_TSQ_CUDA
#include "harness/benchmark.h"
#endif
#ifdef JAX_TSQ_HANDLERS
#include "harness/calls.h"
#endif

namespace jax_tsq::harness {

// One problem, which kernels and the oracle solve in memory of their own.
class Test {
 public:
  virtual ~Test() = default;

  virtual std::string name() const = 0;
  // All that it takes to make the same problem again.
  virtual std::string Describe() const { return name(); }
  virtual Memory MakeMemory() const = 0;

  // Whether bytes are specified. If not, two runs must have the same.
  virtual bool IsExact() const { return true; }
  // The oracle, where they are.
  virtual void Expect(const Addresses&) const {}
  // Empty, or what is wrong with the memory that a kernel has left.
  virtual std::string Compare(const Memory& expected, const Memory& got) const { return FindDifference(expected, got); }

  // They return null or a message. Only kernels that the operation has are asked for.
  virtual const char* RunOnCpu(const Addresses&, const Executor&, CpuLevel) const { return "no such kernel"; }
  virtual const char* RunOnCuda(const Addresses&, Stream) const { return "no such kernel"; }
};

using Tests = std::vector<std::unique_ptr<Test>>;

struct Operation {
  std::string name;
  bool on_cpu = true;
  bool needs_sm90 = false;
  // Where something once seemed likely to break.
  std::function<Tests()> named;
  std::function<std::unique_ptr<Test>(std::mt19937&)> random;
  // All pairs of values that a conversion depends on, each with and without pow_2_scales.
  std::function<Tests()> pairs = [] { return Tests(); };
  // Tests with memory of one layout: a graph that recorded the first one is replayed with the data of each.
  std::function<Tests()> replayed = [] { return Tests(); };
#ifdef JAX_TSQ_CUDA
  // More than 2^31 elements: empty, or what is wrong.
  std::function<std::string()> large;
  std::function<std::vector<Benchmark>()> benchmarks = [] { return std::vector<Benchmark>(); };
#endif
#ifdef JAX_TSQ_HANDLERS
  CallRules calls;
#endif
};

// Sorted by name.
const std::vector<Operation>& Operations();

struct Registration {
  explicit Registration(Operation operation);
};

// Whether something is asked for by the beginning of its name; all is where no names are given.
bool IsChosen(const std::string& name, const std::vector<std::string>& names);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPERATION_H_
