// harness check [--cpu | --cuda] [--cases N] [--seed S] [--random-only] [--only-readable]
// harness large
// harness wgrad [case-name...]
// harness bench [case-name...]

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "commands.h"

namespace {

int Usage() {
  std::fprintf(stderr,
               "usage: harness check [--cpu | --cuda] [--cases N] [--seed S] [--random-only] [--only-readable]\n"
               "       harness large\n"
               "       harness wgrad [case-name...]\n"
               "       harness bench [case-name...]\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace jax_tsq::harness;
  const std::vector<std::string> arguments(argv + (argc > 1 ? 2 : 1), argv + argc);
  const std::string command = argc > 1 ? argv[1] : "";
#ifdef JAX_TSQ_CUDA
  if (command == "large" && arguments.empty()) return CheckLarge();
  if (command == "bench") {
    const int status = Bench(arguments);
    return status != 0 ? status : BenchWgrad(arguments);
  }
  if (command == "wgrad") return CheckWgrad(arguments);
#endif
  if (command != "check") return Usage();
  CheckOptions options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const bool has_value = i + 1 < arguments.size();
    if (argument == "--cpu") {
      options.cuda = false;
    } else if (argument == "--cuda") {
      options.cpu = false;
    } else if (argument == "--cases" && has_value) {
      options.cases = std::atoi(arguments[++i].c_str());
    } else if (argument == "--seed" && has_value) {
      options.seed = static_cast<unsigned>(std::strtoul(arguments[++i].c_str(), nullptr, 10));
    } else if (argument == "--random-only") {
      options.named = false;
    } else if (argument == "--only-readable") {
      options.only_readable = true;
    } else {
      return Usage();
    }
  }
  return Check(options);
}
