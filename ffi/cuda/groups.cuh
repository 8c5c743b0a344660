// Where groups lie whose sizes only the device knows: one walk over the sizes by a warp.

#ifndef JAX_TSQ_CUDA_GROUPS_CUH_
#define JAX_TSQ_CUDA_GROUPS_CUH_

#include <cstdint>

#include "core/numerics.h"
#include "cuda/launch.cuh"

namespace jax_tsq::cuda {

// Most group sizes that a lane reads at once, so that 256 groups are one step of a warp.
inline constexpr uint32_t kSizesPerLane = 8;

__device__ __forceinline__ uint32_t Pad(uint32_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

struct GroupSizes {
  const int32_t* sizes;  // [batch, groups]; any values, see TakeGroup
  int64_t groups;
  uint32_t tokens;  // of a batch
  bool aligned;     // sizes count in whole blocks
};

template <class Problem>
__device__ __forceinline__ GroupSizes GroupsOf(const Problem& problem) {
  return {problem.group_sizes, problem.groups, static_cast<uint32_t>(problem.input.tokens), problem.aligned};
}

struct Group {
  uint32_t index;
  uint32_t first_row;  // of this batch's x
  uint32_t rows;
  uint32_t padded_start;  // in tokens of a result whose groups start at whole blocks
};

// Sum of `value` <= `limit` over the lanes up to this one, or `limit` if it is larger.
__device__ __forceinline__ uint32_t PrefixSum(uint32_t value, uint32_t limit) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value = min(value + below, limit);
  }
  return value;
}

// Called by one warp: `visit` sees each group of a batch once, on some lane, until it returns true, and perhaps empty
// groups past the last. Sums of sizes stop at the tokens, which gives each group what TakeGroup gives it and keeps them
// within 32 bits. Returns the rows of all groups, or `tokens` if it was stopped.
template <class Visit>
__device__ __forceinline__ uint32_t VisitGroups(const GroupSizes& groups, int64_t batch, const Visit& visit) {
  const int32_t* sizes = groups.sizes + batch * groups.groups;
  const auto count = static_cast<uint32_t>(groups.groups);
  const uint32_t tokens = groups.tokens;
  const uint32_t whole = groups.aligned ? ~(kBlock - 1u) : ~0u;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t sizes_per_lane = min((count + kWarp - 1) / kWarp, kSizesPerLane);
  uint32_t rows_before = 0;
  uint32_t padded_before = 0;
  for (uint32_t chunk = 0; chunk < count; chunk += kWarp * sizes_per_lane) {
    const uint32_t first = chunk + lane * sizes_per_lane;
    uint32_t size[kSizesPerLane];
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      const bool exists = i < sizes_per_lane && first + i < count;
      size[i] = exists ? static_cast<uint32_t>(max(__ldg(sizes + first + i), 0)) & whole : 0;
    }

    // Rows of all groups before the lane's
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      sum += min(size[i], tokens - sum);
    }
    const uint32_t rows_after = min(rows_before + PrefixSum(sum, tokens), tokens);
    uint32_t first_row = __shfl_up_sync(kAllLanes, rows_after, 1);
    if (lane == 0) first_row = rows_before;

    // Padded rows of all groups before the lane's
    uint32_t row = first_row;
    uint32_t padded = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      size[i] = min(size[i], tokens - row);
      row += size[i];
      padded += Pad(size[i]);
    }
    const uint32_t padded_after = padded_before + PrefixSum(padded, UINT32_MAX);

    // Visits
    row = first_row;
    padded = padded_after - padded;
    bool done = false;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      done |= visit(Group{first + i, row, size[i], padded});
      row += size[i];
      padded += Pad(size[i]);
    }
    if (__any_sync(kAllLanes, done)) return tokens;
    rows_before = __shfl_sync(kAllLanes, rows_after, kWarp - 1);
    padded_before = __shfl_sync(kAllLanes, padded_after, kWarp - 1);
  }
  return rows_before;
}

// Called by one warp.
__device__ __forceinline__ void WritePaddedSizes(const GroupSizes& groups, int64_t batch, int32_t* padded_sizes) {
  padded_sizes += batch * groups.groups;
  VisitGroups(groups, batch, [&](const Group& group) {
    if (group.index < groups.groups) padded_sizes[group.index] = static_cast<int32_t>(Pad(group.rows));
    return false;
  });
}

// What a padded result holds at some block of tokens.
struct Slot {
  uint32_t first_row;  // of this batch's x
  uint32_t end_row;    // of the group
  uint32_t start;      // the group's, in tokens of the result
  uint32_t padded;     // the group's
  int rows;
};

// Fills the slot at `token` if the group is there.
__device__ __forceinline__ bool FillSlot(const Group& group, uint32_t token, Slot& slot) {
  const uint32_t offset = token - group.padded_start;
  if (token < group.padded_start || offset >= Pad(group.rows)) return false;
  const int rows = static_cast<int>(min(group.rows - offset, uint32_t{kBlock}));
  slot = {group.first_row + offset, group.first_row + group.rows, group.padded_start, Pad(group.rows), rows};
  return true;
}

// Called by one warp. A block behind the last group is a padded group of its own, without rows.
__device__ __forceinline__ void FindSlot(const GroupSizes& groups, int64_t batch, uint32_t token, Slot& slot) {
  if (threadIdx.x % kWarp == 0) slot = {0, 0, token, kBlock, 0};
  __syncwarp();
  VisitGroups(groups, batch, [&](const Group& group) { return FillSlot(group, token, slot); });
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_GROUPS_CUH_
