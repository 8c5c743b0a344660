// What operations share that take group sizes: their cases and calls.

#ifndef JAX_TSQ_HARNESS_OPS_GROUPS_H_
#define JAX_TSQ_HARNESS_OPS_GROUPS_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "harness/ops/input.h"

namespace jax_tsq::harness {

using Sizes = std::vector<int32_t>;

struct GroupCase : InputCase {
  int64_t groups = 0;
  Sizes sizes;  // [batch, groups]
  bool aligned = false;
  int64_t extra_blocks = 0;  // in a padded result

  // Tokens of a padded result.
  int64_t Padded() const;
};

std::string Describe(const GroupCase& c);
// Of each batch: the first ones, which may be read.
std::vector<int64_t> RowsInGroups(const GroupCase& c);

GroupCase MakeGroupCase(std::string name, int64_t tokens, const Sizes& sizes, int64_t features, int64_t batch = 1);
std::vector<GroupCase> NamedGroupCases();
GroupCase RandomGroupCase(std::mt19937& random);
// Their arrays have the same sizes.
std::vector<GroupCase> ReplayedGroupCases();

#ifdef JAX_TSQ_HANDLERS
InputShape MakeGroupShape(Bytes& bytes, int64_t& groups);
// Tokens of a padded result.
Wide PaddedSize(const InputShape& shape, int64_t groups, bool aligned);
// Whether there is one that the operations take.
bool CanPad(const InputShape& shape, int64_t groups, bool aligned);
#endif

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_OPS_GROUPS_H_
