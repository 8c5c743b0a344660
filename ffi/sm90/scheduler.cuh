// The tiles of a thread block that stays on its multiprocessor and takes one after the other.

#ifndef JAX_TSQ_SM90_SCHEDULER_CUH_
#define JAX_TSQ_SM90_SCHEDULER_CUH_

#include <cstdint>

#include "sm90/pipeline.cuh"

namespace jax_tsq::sm90 {

// Tiles that are decided ahead, in shared memory: two batches of one for each lane.
inline constexpr int kListed = 2 * kWarp;
// The batches are a pipeline: its producers are the lanes of the warp that lists, its consumers those of warps that
// read. One lane could give a batch back for its warp, but race checkers do not follow that.
using TileBatches = Pipeline<2>;

// One warp lists the tiles of this thread block: tile_at(0), tile_at(1) and so on, until one says with IsEnd() that it
// is none.
template <class Tile, class TileAt>
__device__ __forceinline__ void ListTiles(TileBatches& batches, Tile (&tiles)[kListed], const TileAt& tile_at) {
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t batch = 0;; ++batch) {
    const Tile tile = tile_at(batch * kWarp + lane);
    Wait(batches.empty[batch % 2], batch / 2 % 2 ^ 1);
    tiles[batch % 2 * kWarp + lane] = tile;
    Arrive(batches.full[batch % 2]);
    if (__any_sync(kAllLanes, tile.IsEnd())) return;
  }
}

// A warp's way through the list.
template <class Tile>
class TileReader {
 public:
  __device__ __forceinline__ TileReader(TileBatches& batches, const Tile (&tiles)[kListed])
      : batches_(batches), tiles_(tiles) {}

  __device__ __forceinline__ Tile Next() {
    const uint32_t batch = next_ / kWarp;
    if (next_ % kWarp == 0) {
      if (batch > 0) Arrive(batches_.empty[(batch - 1) % 2]);
      Wait(batches_.full[batch % 2], batch / 2 % 2);
    }
    const Tile tile = tiles_[next_++ % kListed];
    __syncwarp();
    return tile;
  }

 private:
  TileBatches& batches_;
  const Tile (&tiles_)[kListed];
  uint32_t next_ = 0;
};

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_SCHEDULER_CUH_
