#include "harness/cases.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

#include "core/numerics.h"

namespace jax_tsq::harness {
namespace {

using Counts = std::vector<int64_t>;
using Sizes = std::vector<int32_t>;
constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();

int64_t Sum(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

Case Split(std::string name, const Counts& counts, int64_t features) {
  Case c;
  c.name = std::move(name);
  c.tokens = Sum(counts);
  c.features = features;
  c.tokens_per_expert = counts;
  return c;
}

Case Ragged(std::string name, int64_t tokens, const Sizes& sizes, int64_t features, int64_t batch = 1) {
  Case c;
  c.name = std::move(name);
  c.ragged = true;
  c.batch = batch;
  c.tokens = tokens;
  c.features = features;
  c.groups = static_cast<int64_t>(sizes.size()) / std::max<int64_t>(batch, 1);
  c.group_sizes = sizes;
  return c;
}

// The case with either input type and rounding, by the smallest misalignment too.
void AddVariants(std::vector<Case>& cases, const Case& base) {
  for (const InputType type : {InputType::kBf16, InputType::kFp8}) {
    for (const bool pow_2_scales : {false, true}) {
      for (const int offset : {0, 1}) {
        Case c = base;
        c.type = type;
        c.pow_2_scales = pow_2_scales;
        c.x_offset = c.out_offset = c.scales_offset = offset;
        cases.push_back(c);
      }
    }
  }
}

int64_t Uniform(std::mt19937& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % (high - low + 1));
}

int64_t RandomFeatures(std::mt19937& random) {
  switch (random() % 5) {
    case 0:
      return 8 * Uniform(random, 1, 40);
    case 1:
      return 128 * Uniform(random, 1, 3);
    case 2:
      return Uniform(random, 1, 20);
    default:
      return Uniform(random, 1, 400);
  }
}

}  // namespace

std::vector<Case> NamedCases() {
  std::vector<Case> cases;
  Counts staircase(41);
  std::iota(staircase.begin(), staircase.end(), 0);
  for (const auto& [name, counts] : std::vector<std::pair<std::string, Counts>>{
           {"the documented example", {128, 128, 128}},
           {"no experts", {}},
           {"unused experts only", {0, 0}},
           {"unused experts", {0, 128, 0, 0, 256, 0}},
           {"one token", {1}},
           {"every short count", staircase},
           {"long odd experts", {1537, 511, 700, 129}},
           {"long experts of 16", {1040, 528, 16}},
           {"long and short", {1200, 1, 0, 3}},
       }) {
    for (const int64_t features : {0, 1, 65, 136, 512}) AddVariants(cases, Split(name, counts, features));
  }
  for (const int64_t tokens : {4112, 4224}) AddVariants(cases, Split("one very long expert", {tokens}, 136));
  cases.push_back(Split("an input that is not small", {4096, 4096, 4096, 4096, 128}, 1032));
  cases.push_back(Split("more whole experts than a launch takes", Counts(1025, 128), 24));
  for (const int64_t experts : {1024, 1025, 2500}) {
    Counts counts(experts, 1);
    AddVariants(cases, Split("an expert a token", counts, 9));
    for (int64_t i = 0; i < experts; ++i) counts[i] = i % 4;
    AddVariants(cases, Split("many experts", counts, 24));
    Case c = Split("many experts, batched", Counts(experts, 16), 8);
    c.batch = 2;
    AddVariants(cases, c);
  }
  for (const int64_t batch : {0, 3}) {
    Case c = Split("batched", {130, 0, 257}, 72);
    c.batch = batch;
    AddVariants(cases, c);
  }

  Sizes last(1000, 0);
  last[999] = 130;
  Sizes sparse(3 * 700, 0);
  sparse[5] = sparse[699] = sparse[1000] = 90;
  const std::vector<Case> ragged = {
      Ragged("no tokens", 0, {0, 3, -1}, 24),
      Ragged("no groups", 200, {}, 24),
      Ragged("no features", 200, {100, 100}, 0),
      Ragged("no batch", 200, {}, 24, 0),
      Ragged("one group", 384, {384}, 200),
      Ragged("one long group", 1000, {900}, 136),
      Ragged("whole blocks", 640, {128, 0, 384, 128}, 136),
      Ragged("a quarter full", 1024, {100, 0, 156}, 65),
      Ragged("negative sizes", 300, {-5, 100, kLeast, 100, -1}, 71),
      Ragged("sizes past the end", 300, {100, kMost, 100, kMost}, 72),
      Ragged("huge sizes that overflow", 256, Sizes(300, kMost), 9),
      Ragged("one row each", 300, Sizes(300, 1), 16),
      Ragged("the last of many groups", 130, last, 24),
      Ragged("two batches", 260, {100, 100, 60, 0, 7, 300}, 129, 2),
      Ragged("many groups in batches", 200, sparse, 8, 3),
  };
  for (const Case& base : ragged) {
    for (const int flags : {0, 1, 2, 3}) {
      Case c = base;
      c.aligned = flags & 1;
      c.flat = flags & 2;
      c.extra_blocks = flags;
      AddVariants(cases, c);
    }
  }
  return cases;
}

Case RandomCase(std::mt19937& random) {
  Case c;
  c.name = "random";
  c.seed = random();
  c.ragged = random() % 2;
  c.type = random() % 2 ? InputType::kBf16 : InputType::kFp8;
  c.pow_2_scales = random() % 2;
  c.data = static_cast<Data>(random() % 3);
  c.batch = random() % 4 ? 1 : Uniform(random, 2, 3);
  c.features = RandomFeatures(random);
  if (random() % 2) {
    c.x_offset = static_cast<int>(Uniform(random, 0, 15));
    c.out_offset = static_cast<int>(Uniform(random, 0, 15));
    c.scales_offset = static_cast<int>(Uniform(random, 0, 3));
  }

  const int64_t experts = Uniform(random, 1, random() % 4 ? 6 : 60);
  const int64_t step = std::array<int64_t, 5>{128, 16, 4, 1, 1}[random() % 5];
  const int64_t most = experts > 6 ? 60 : random() % 2 ? 300 : 900;
  for (int64_t i = 0; i < experts; ++i) {
    const int64_t count = random() % 5 ? Uniform(random, 0, most) / step * step : 0;
    c.tokens_per_expert.push_back(count);
  }
  c.tokens = Sum(c.tokens_per_expert);
  if (!c.ragged) return c;

  c.groups = experts;
  c.aligned = random() % 3 == 0;
  c.flat = random() % 2;
  c.extra_blocks = random() % 3 ? 0 : Uniform(random, 1, 3);
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    c.group_sizes.insert(c.group_sizes.end(), c.tokens_per_expert.begin(), c.tokens_per_expert.end());
    if (random() % 2) std::shuffle(c.group_sizes.end() - experts, c.group_sizes.end(), random);
    int32_t* sizes = c.group_sizes.data() + batch * experts;
    if (random() % 4 == 0) sizes[random() % experts] = static_cast<int32_t>(random());
    if (random() % 4 == 0) sizes[random() % experts] = 0;
  }
  c.tokens_per_expert.clear();
  if (random() % 3 == 0) c.tokens += Uniform(random, 0, 400);
  return c;
}

namespace {
constexpr int64_t kPairFeatures = 4096;
}

int64_t CountPairCases() { return CeilDiv(CountPairColumns(), kPairFeatures); }

Case PairCase(int64_t index, bool pow_2_scales) {
  Case c = Split("pairs", {kBlock}, kPairFeatures);
  c.data = Data::kPairs;
  c.first_column = index * kPairFeatures;
  c.pow_2_scales = pow_2_scales;
  return c;
}

std::string Describe(const Case& c) {
  std::ostringstream text;
  text << (c.ragged ? "ragged" : "split") << " '" << c.name << "' " << (c.type == InputType::kBf16 ? "bf16" : "fp8")
       << (c.pow_2_scales ? " pow2" : "") << (c.aligned ? " aligned" : "") << (c.flat ? " flat" : "") << " batch "
       << c.batch << " tokens " << c.tokens << " features " << c.features << " offsets x " << c.x_offset << " out "
       << c.out_offset << " scales " << c.scales_offset << " extra blocks " << c.extra_blocks << " data "
       << static_cast<int>(c.data) << " seed " << c.seed << " first column " << c.first_column << " counts";
  for (size_t i = 0; i < std::min<size_t>(c.tokens_per_expert.size(), 64); ++i) text << ' ' << c.tokens_per_expert[i];
  for (size_t i = 0; i < std::min<size_t>(c.group_sizes.size(), 64); ++i) text << ' ' << c.group_sizes[i];
  return text.str();
}

}  // namespace jax_tsq::harness
