// The entry of libFuzzer, which looks for bytes that reach new code.

#include <cstdio>
#include <cstdlib>

#include "harness/calls.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  using namespace jax_tsq::harness;
  const Call call = MakeCall(bytes, size);
  std::string fault;
  if (CheckCall(call, nullptr, fault) != Verdict::kFault) return 0;
  std::fprintf(stderr, "FAULT %s\n  %s\n", fault.c_str(), Describe(call).c_str());
  std::abort();
}
