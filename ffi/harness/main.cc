// harness check [--cpu | --cuda] [--cases N] [--seed S] [--random-only] [--only-readable] [--threads N] [name...]
// harness pairs [--cpu | --cuda] [--threads N] [--step N]
// harness calls [--cases N] [--seed S] [--threads N]
// harness large
// harness bench [name...]
//
// A name is the beginning of "operation/case", or of what bench prints.

#include <cstdio>
#include <cstdlib>
#include <map>

#include "harness/commands.h"

namespace jax_tsq::harness {
namespace {

int Usage() {
  std::fprintf(stderr,
               "usage: harness check [--cpu | --cuda] [--cases N] [--seed S] [--random-only] [--only-readable] "
               "[--threads N] [name...]\n"
               "       harness pairs [--cpu | --cuda] [--threads N] [--step N]\n"
               "       harness calls [--cases N] [--seed S] [--threads N]\n"
               "       harness large\n"
               "       harness bench [name...]\n");
  return 2;
}

int Main(const std::string& command, const std::vector<std::string>& arguments) {
#ifdef JAX_TSQ_CUDA
  if (command == "large" && arguments.empty()) return CheckLarge();
  if (command == "bench") return Bench(arguments);
#endif
  CheckOptions check;
  CallsOptions calls;
  int step = 1;
  const std::map<std::string, std::pair<bool*, bool>> flags = {{"--cpu", {&check.cuda, false}},
                                                               {"--cuda", {&check.cpu, false}},
                                                               {"--random-only", {&check.named, false}},
                                                               {"--only-readable", {&check.only_readable, true}}};
  const std::map<std::string, std::vector<int*>> numbers = {
      {"--cases", {&check.cases, &calls.cases}}, {"--threads", {&check.threads, &calls.threads}}, {"--step", {&step}}};
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool has_value = i + 1 < arguments.size();
    if (const auto flag = flags.find(arguments[i]); flag != flags.end()) {
      *flag->second.first = flag->second.second;
    } else if (const auto number = numbers.find(arguments[i]); number != numbers.end() && has_value) {
      ++i;
      for (int* value : number->second) *value = std::atoi(arguments[i].c_str());
    } else if (arguments[i] == "--seed" && has_value) {
      check.seed = calls.seed = static_cast<unsigned>(std::strtoul(arguments[++i].c_str(), nullptr, 10));
    } else if (arguments[i].rfind("-", 0) != 0 && command == "check") {
      check.names.push_back(arguments[i]);
    } else {
      return Usage();
    }
  }
  if (command == "check") return Check(check);
  if (command == "pairs" && step > 0) return CheckPairs(check, step);
#ifdef JAX_TSQ_HANDLERS
  if (command == "calls") return Calls(calls);
#endif
  return Usage();
}

}  // namespace
}  // namespace jax_tsq::harness

int main(int argc, char** argv) {
  return jax_tsq::harness::Main(argc > 1 ? argv[1] : "", {argv + (argc > 1 ? 2 : 1), argv + argc});
}
