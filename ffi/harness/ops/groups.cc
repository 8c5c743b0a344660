#include "harness/ops/groups.h"

#include <algorithm>
#include <limits>

#include "core/groups.h"
#include "core/limits.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();

}  // namespace

int64_t GroupCase::Padded() const { return PaddedTokens(tokens, groups, aligned) + extra_blocks * kBlock; }

std::string Describe(const GroupCase& c) {
  return Describe(static_cast<const InputCase&>(c)) + (c.aligned ? " aligned" : "") + " extra blocks " +
         std::to_string(c.extra_blocks) + " sizes" + Describe(c.sizes);
}

std::vector<int64_t> RowsInGroups(const GroupCase& c) {
  std::vector<int64_t> rows;
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    rows.push_back(RowsTaken(PlaceGroups(c.sizes.data() + batch * c.groups, c.groups, c.tokens, c.aligned)));
  }
  return rows;
}

GroupCase MakeGroupCase(std::string name, int64_t tokens, const Sizes& sizes, int64_t features, int64_t batch) {
  GroupCase c;
  c.name = std::move(name);
  c.batch = batch;
  c.tokens = tokens;
  c.features = features;
  c.groups = static_cast<int64_t>(sizes.size()) / std::max<int64_t>(batch, 1);
  c.sizes = sizes;
  return c;
}

std::vector<GroupCase> NamedGroupCases() {
  Sizes last(1000, 0);
  last[999] = 130;
  Sizes sparse(3 * 700, 0);
  sparse[5] = sparse[699] = sparse[1000] = 90;
  return {
      MakeGroupCase("no tokens", 0, {0, 3, -1}, 24),
      MakeGroupCase("no groups", 200, {}, 24),
      MakeGroupCase("no features", 200, {100, 100}, 0),
      MakeGroupCase("no batch", 200, {}, 24, 0),
      MakeGroupCase("one group", 384, {384}, 200),
      MakeGroupCase("one long group", 1000, {900}, 136),
      MakeGroupCase("whole blocks", 640, {128, 0, 384, 128}, 136),
      MakeGroupCase("a quarter full", 1024, {100, 0, 156}, 65),
      MakeGroupCase("negative sizes", 300, {-5, 100, kLeast, 100, -1}, 71),
      MakeGroupCase("sizes past the end", 300, {100, kMost, 100, kMost}, 72),
      MakeGroupCase("huge sizes that overflow", 256, Sizes(300, kMost), 9),
      MakeGroupCase("one row each", 300, Sizes(300, 1), 16),
      MakeGroupCase("the last of many groups", 130, last, 24),
      MakeGroupCase("two batches", 260, {100, 100, 60, 0, 7, 300}, 129, 2),
      MakeGroupCase("many groups in batches", 200, sparse, 8, 3),
  };
}

GroupCase RandomGroupCase(std::mt19937& random) {
  GroupCase c;
  MakeRandom(random, c);
  c.batch = random() % 4 ? 1 : Uniform(random, 2, 3);
  const std::vector<int64_t> counts = RandomCounts(random);
  c.tokens = Sum(counts);
  c.groups = static_cast<int64_t>(counts.size());
  c.aligned = random() % 3 == 0;
  c.extra_blocks = random() % 3 ? 0 : Uniform(random, 1, 3);
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    c.sizes.insert(c.sizes.end(), counts.begin(), counts.end());
    if (random() % 2) std::shuffle(c.sizes.end() - c.groups, c.sizes.end(), random);
    int32_t* sizes = c.sizes.data() + batch * c.groups;
    if (random() % 4 == 0) sizes[random() % c.groups] = static_cast<int32_t>(random());
    if (random() % 4 == 0) sizes[random() % c.groups] = 0;
  }
  if (random() % 3 == 0) c.tokens += Uniform(random, 0, 400);
  return c;
}

std::vector<GroupCase> ReplayedGroupCases() {
  std::vector<GroupCase> cases;
  for (const Sizes& sizes : std::vector<Sizes>{{0, 700, 0, 0}, {100, 200, 300, 100}, {-1, 5, kMost, 0}, {0, 0, 0, 0}}) {
    cases.push_back(MakeGroupCase("replay", 700, sizes, 200));
  }
  return cases;
}

#ifdef JAX_TSQ_HANDLERS

InputShape MakeGroupShape(Bytes& bytes, int64_t& groups) {
  std::vector<int64_t> counts;
  InputShape shape = MakeInputShape(bytes, counts);
  shape.tokens += bytes.Next() % 8 ? 0 : 150;
  groups = static_cast<int64_t>(counts.size());
  if (MakeHugeInput(bytes, shape) && bytes.Flag()) groups = 0;
  return shape;
}

Wide PaddedSize(const InputShape& shape, int64_t groups, bool aligned) {
  if (aligned) return Blocks(shape.tokens) * 128;
  return (shape.tokens + Wide{127} * std::min(groups, shape.tokens)) / 128 * 128;
}

bool CanPad(const InputShape& shape, int64_t groups, bool aligned) {
  if (groups < 0) return false;
  const Wide padded = PaddedSize(shape, groups, aligned);
  return padded <= kMostTokens && padded * shape.features <= kMostElements;
}

#endif

}  // namespace jax_tsq::harness
