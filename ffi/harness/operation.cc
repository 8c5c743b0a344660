#include "harness/operation.h"

#include <algorithm>
#include <utility>

namespace jax_tsq::harness {
namespace {

std::vector<Operation>& Registered() {
  static std::vector<Operation> operations;
  return operations;
}

}  // namespace

const std::vector<Operation>& Operations() { return Registered(); }

Registration::Registration(Operation operation) {
  std::vector<Operation>& all = Registered();
  const auto before = [](const Operation& a, const Operation& b) { return a.name < b.name; };
  all.insert(std::upper_bound(all.begin(), all.end(), operation, before), std::move(operation));
}

bool IsChosen(const std::string& name, const std::vector<std::string>& names) {
  const auto begins = [&](const std::string& with) { return name.compare(0, with.size(), with) == 0; };
  return names.empty() || std::any_of(names.begin(), names.end(), begins);
}

}  // namespace jax_tsq::harness
