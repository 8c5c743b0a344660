// What the warps of ragged_matmul share: the tile, shared memory, where groups lie, and the order of tiles.

#ifndef JAX_TSQ_MATMUL_MATMUL_TILES_CUH_
#define JAX_TSQ_MATMUL_MATMUL_TILES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "core/limits.h"
#include "core/numerics.h"
#include "cuda/groups.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/store.cuh"
#include "sm90/wgmma.cuh"

namespace jax_tsq::sm90::matmul {

// The tile of y. Its rows come in pieces of 64, one for each promoting warpgroup.
inline constexpr int kPromoters = 3;  // warpgroups
inline constexpr int kTileRows = kPromoters * kProductRows;
inline constexpr int kTileColumns = kProductColumns;
inline constexpr int kStages = 4;  // blocks of features in flight
inline constexpr int kThreads = kWarpgroup * (1 + kPromoters);
inline constexpr int kFeedRegisters = 56;      // 512 threads share 65,536 registers
inline constexpr int kPromoteRegisters = 152;  // 64 sums, 64 products and what is needed to get at the next
static_assert(kTileColumns == kBlock, "a tile has one scale of w for each block of features");

// Thread blocks of a cluster have tiles of the same rows and neighbouring columns, so that x is loaded once for both.
inline constexpr int kCluster = 2;

inline constexpr int kPieceBytes = kProductRows * kBlock;  // of x

// Tiles are taken in bands of so many tiles of rows, column after column: what runs at the same time shares rows of x
// and columns of w in L2.
inline constexpr uint32_t kBand = 8;

struct Tile {
  __device__ bool IsEnd() const { return rows == 0; }

  uint32_t row, rows;  // in y, all of one group
  uint32_t column;
  uint32_t group;
};

struct __align__(1024) Shared {
  // Operands of each stage, in rows of 128 features.
  uint8_t x[kStages][kPromoters][kPieceBytes];
  uint8_t w[kStages][kTileColumns * kBlock];
  Chunk chunks[kPromoters][2];
  // Scales of each stage. Of every 16 rows, r and r + 8 lie side by side: a thread has products of both.
  float2 x_scales[kStages][kTileRows / 2];
  float w_scale[kStages];
  Tile tiles[kListed];
  Pipeline<kStages> pipeline;
  TileBatches batches;
  // Of each group, and where the last one ends.
  uint32_t first_row[kMostProductGroups + 1];
  uint32_t first_tile[kMostProductGroups + 1];  // of rows
};

struct Arguments {
  const float* x_scales;
  const float* w_scales;
  const int32_t* group_sizes;
  uint4* y;
  uint32_t tokens, columns, groups;
  uint32_t blocks;                               // of features
  uint32_t scale_block_step, scale_column_step;  // in w_scales, from one block of features or columns to the next
};

// Writes sums of count(i) over all groups before, none above `most`, to first[0 .. groups]. Called by one warp; counts
// and `most` are below 2^31.
template <class Count>
__device__ __forceinline__ void SumGroups(uint32_t groups, uint32_t most, const Count& count, uint32_t* first) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t before = 0;
  for (uint32_t chunk = 0; chunk < groups; chunk += kWarp) {
    const uint32_t i = chunk + lane;
    const uint32_t own = i < groups ? min(count(i), most) : 0;
    const uint32_t end = min(before + cuda::PrefixSum(own, most), most);
    if (i < groups) first[i + 1] = end;
    before = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  if (lane == 0) first[0] = 0;
}

// Called by all threads. Sizes are taken as TakeGroup takes them: no group reaches past the last token.
__device__ __forceinline__ void PlaceGroups(const Arguments& arguments, Shared& shared) {
  uint32_t* const sizes = shared.first_tile;  // until its own content is known
  for (uint32_t i = threadIdx.x; i < arguments.groups; i += kThreads) sizes[i] = max(arguments.group_sizes[i], 0);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    SumGroups(arguments.groups, arguments.tokens, [&](uint32_t i) { return sizes[i]; }, shared.first_row);
    __syncwarp();
    const auto tiles = [&](uint32_t i) { return CeilDiv(shared.first_row[i + 1] - shared.first_row[i], kTileRows); };
    SumGroups(arguments.groups, INT32_MAX, tiles, shared.first_tile);
  }
  __syncthreads();
}

// Rows of tile number `index` of a group. It is cut into as few tiles as hold it, which differ by one piece at most:
// no tile is left with a single piece where its neighbours could take part of the work.
__host__ __device__ __forceinline__ void CutGroup(uint32_t first_row, uint32_t rows, uint32_t index, Tile& tile) {
  const uint32_t pieces = CeilDiv(rows, kProductRows), tiles = CeilDiv(rows, kTileRows);
  const uint32_t least = pieces / tiles, larger = pieces % tiles;
  const uint32_t first = (index * least + (index < larger ? index : larger)) * kProductRows;
  const uint32_t most = (least + (index < larger)) * kProductRows;
  tile.row = first_row + first;
  tile.rows = rows - first < most ? rows - first : most;
}

// The tiles of this thread block. Where the number of column tiles is odd, the last ones have columns that do not
// exist.
class TileOrder {
 public:
  __device__ __forceinline__ TileOrder(const Arguments& arguments, const Shared& shared)
      : shared_(shared),
        groups_(arguments.groups),
        rows_(shared.first_tile[arguments.groups]),
        columns_(CeilDiv(arguments.columns, kCluster * kTileColumns)) {}

  __device__ __forceinline__ Tile operator()(uint32_t round) const {
    const uint32_t number = (round * gridDim.x + blockIdx.x) / kCluster;
    if (number >= rows_ * columns_) return {};
    const uint32_t band = number / (kBand * columns_) * kBand;
    const uint32_t within = number - band * columns_;
    const uint32_t height = min(kBand, rows_ - band);
    const uint32_t row = band + within % height;
    Tile tile;
    tile.column = (within / height * kCluster + blockIdx.x % kCluster) * kTileColumns;
    tile.group = FindGroup(row);
    const uint32_t first_row = shared_.first_row[tile.group];
    CutGroup(first_row, shared_.first_row[tile.group + 1] - first_row, row - shared_.first_tile[tile.group], tile);
    return tile;
  }

 private:
  // The last group that starts at a tile of rows or before: empty ones have no tile.
  __device__ __forceinline__ uint32_t FindGroup(uint32_t row) const {
    uint32_t low = 0, high = groups_;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (shared_.first_tile[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  const Shared& shared_;
  const uint32_t groups_;
  const uint32_t rows_, columns_;  // tiles
};

}  // namespace jax_tsq::sm90::matmul

#endif  // JAX_TSQ_MATMUL_MATMUL_TILES_CUH_
