// Groups of rows, whose sizes only the device knows, on the host.

#ifndef JAX_TSQ_CPU_GROUPS_H_
#define JAX_TSQ_CPU_GROUPS_H_

#include <cstdint>

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

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_GROUPS_H_
