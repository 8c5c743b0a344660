// Groups of rows, whose sizes only the device knows, on the host.

#ifndef JAX_TSQ_CPU_GROUPS_H_
#define JAX_TSQ_CPU_GROUPS_H_

#include <cstdint>
#include <vector>

#include "core/groups.h"

namespace jax_tsq::cpu {

struct GroupSizes {
  const int32_t* sizes;  // [batch, groups], any values
  int64_t groups;
  bool aligned;  // sizes count in whole blocks
};

// Rows of a batch that are in groups: the first ones.
inline int64_t RowsInGroups(const GroupSizes& groups, int64_t batch, int64_t tokens) {
  int64_t rows = 0;
  for (int64_t i = batch * groups.groups; i < (batch + 1) * groups.groups; ++i) {
    rows += TakeGroup(groups.sizes[i], tokens - rows, groups.aligned);
  }
  return rows;
}

// What a padded result holds at one block of tokens.
struct PaddedBlock {
  int64_t first_row;  // of all batches
  int rows;
  int64_t group_start, group_padded;  // the group's part of the padded tokens
};

// Where groups lie in x and in a result where they start at whole blocks. What is left of the result is a group without
// rows.
class PaddedLayout {
 public:
  // Writes `padded_sizes`, [batch, groups].
  PaddedLayout(const GroupSizes& groups, int64_t batch, int64_t tokens, int64_t padded_tokens, int32_t* padded_sizes);

  // The block of this number among those of all batches.
  PaddedBlock At(int64_t index) const;

 private:
  struct Group {
    int64_t first_row;
    int64_t rows;
    int64_t first_padded;
    int64_t padded;
  };

  const int64_t tokens_;
  const int64_t blocks_;  // of a batch
  const int64_t groups_;  // of a batch, with the one that is left
  std::vector<Group> placed_;
};

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_GROUPS_H_
