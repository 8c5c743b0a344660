// What the warps of the weight gradient share: the tile, shared memory, and the order of tiles.

#ifndef JAX_TSQ_WGRAD_WGRAD_TILES_CUH_
#define JAX_TSQ_WGRAD_WGRAD_TILES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "core/limits.h"
#include "core/numerics.h"
#include "cuda/groups.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/store.cuh"
#include "sm90/wgmma.cuh"

namespace jax_tsq::sm90::wgrad {

// The tile. 256 x 128 with two promoting warpgroups, each with 128 rows, loads scales of dy half as often: in bfloat16
// it is slightly faster, in float32 slower.
inline constexpr int kPromoters = 3;                         // warpgroups
inline constexpr int kTileRows = kPromoters * kProductRows;  // features of x
inline constexpr int kTileColumns = kProductColumns;         // features of dy
inline constexpr int kStages = 4;                            // blocks of tokens in flight; 3 are slower
inline constexpr int kThreads = kWarpgroup * (1 + kPromoters);
inline constexpr int kFeedRegisters = 32;      // 512 threads share 65,536 registers
inline constexpr int kPromoteRegisters = 160;  // 64 sums, 64 products and what is needed to get at the next

// Blocks of tokens from which on a tile of float32 takes longer to multiply than to write.
inline constexpr uint32_t kLargeGroup = 8;

struct Tile {
  static constexpr uint32_t kEnd = UINT32_MAX;
  __device__ bool IsEnd() const { return blocks == kEnd; }

  uint32_t blocks;  // of tokens, or kEnd
  uint32_t group;
  uint32_t row, column;  // in dW[group]
};

struct __align__(1024) Shared {
  // Operands of each stage: one row for each feature, of 128 tokens.
  uint8_t x[kStages][kTileRows * kBlock];
  uint8_t dy[kStages][kTileColumns * kBlock];
  Chunk chunks[kPromoters][2];  // two fit for each warpgroup
  // Scales are still read when a stage's operands have been used and its next ones are on their way: two of each stage.
  float x_scales[2][kStages][kTileRows];
  float dy_scales[2][kStages][kTileColumns];
  Tile tiles[kListed];
  Pipeline<kStages> pipeline;
  TileBatches batches;
  uint32_t first_block[kMostProductGroups + 1];  // of tokens, of each group
  uint16_t order[kMostProductGroups];            // groups, as their tiles are taken
};

struct Arguments {
  const float* x_scales;
  const float* dy_scales;
  const int32_t* group_sizes;
  uint32_t x_features, dy_features;
  uint32_t groups;
  uint32_t blocks;  // of tokens
};

// Writes where groups start, called by all threads. Sizes are taken as TakeGroup takes them, so that no group reaches
// past the last token, whatever the sizes are.
__device__ __forceinline__ void PlaceGroups(const Arguments& arguments, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < arguments.groups; i += kThreads) {
    const uint32_t size = max(arguments.group_sizes[i], 0);
    shared.first_block[i] = min(size / kBlock, arguments.blocks);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    // Below 2^24 blocks each, so that the sum of a warp's groups and all before is below 2^30.
    uint32_t before = 0;
    for (uint32_t first = 0; first < arguments.groups; first += kWarp) {
      const uint32_t i = first + threadIdx.x;
      const uint32_t own = i < arguments.groups ? shared.first_block[i] : 0;
      const uint32_t sum = cuda::PrefixSum(own, UINT32_MAX);
      if (i < arguments.groups) shared.first_block[i] = min(before + sum - own, arguments.blocks);
      before = min(before + __shfl_sync(kAllLanes, sum, kWarp - 1), arguments.blocks);
    }
    if (threadIdx.x == 0) shared.first_block[arguments.groups] = before;
  }
  __syncthreads();
}

__device__ __forceinline__ uint32_t BlocksOf(const Shared& shared, uint32_t group) {
  return shared.first_block[group + 1] - shared.first_block[group];
}

// Orders groups by size, so that the last tiles, for which some multiprocessors have no companion, are the shortest.
// But a tile of few blocks does little except write dW: after large groups that have no small one to go with, they take
// turns with small ones, whose results go to memory while the next large group is multiplied.
__device__ __forceinline__ void OrderGroups(const Arguments& arguments, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < arguments.groups; i += kThreads) {
    const uint32_t own = BlocksOf(shared, i);
    uint32_t rank = 0, large = 0;
    for (uint32_t j = 0; j < arguments.groups; ++j) {
      const uint32_t other = BlocksOf(shared, j);
      rank += other > own || (other == own && j < i);
      large += other >= kLargeGroup;
    }
    const uint32_t alone = large - min(large, arguments.groups - large);
    const uint32_t smaller_before = rank - min(rank, alone);              // if it is large
    const uint32_t larger_before = min(alone + rank - large + 1, large);  // if it is small
    const uint32_t place = own >= kLargeGroup ? rank + smaller_before : rank - large + larger_before;
    shared.order[place] = static_cast<uint16_t>(i);
  }
  __syncthreads();
}

// The tiles of this thread block. Every one takes a tile of each round, in the order of their numbers and the next time
// in reverse, which evens out that groups differ in size.
class TileOrder {
 public:
  __device__ __forceinline__ TileOrder(const Arguments& arguments, const Shared& shared)
      : shared_(shared),
        groups_(arguments.groups),
        rows_(CeilDiv(arguments.x_features, kTileRows)),
        columns_(CeilDiv(arguments.dy_features, kTileColumns)) {}

  __device__ __forceinline__ Tile operator()(uint32_t round) const {
    const uint32_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const uint32_t number = round * gridDim.x + place;
    const uint32_t turn = number / (rows_ * columns_);
    const uint32_t within = number % (rows_ * columns_);
    if (turn >= groups_) return {Tile::kEnd, 0, 0, 0};
    const uint32_t group = shared_.order[turn];
    // What runs at the same time shall share operands in L2: the shorter side of dW is walked first.
    const bool down = rows_ < columns_;
    return {BlocksOf(shared_, group), group, (down ? within % rows_ : within / columns_) * kTileRows,
            (down ? within / rows_ : within % columns_) * kTileColumns};
  }

 private:
  const Shared& shared_;
  const uint32_t groups_;
  const uint32_t rows_, columns_;  // tiles of a group
};

}  // namespace jax_tsq::sm90::wgrad

#endif  // JAX_TSQ_WGRAD_WGRAD_TILES_CUH_
