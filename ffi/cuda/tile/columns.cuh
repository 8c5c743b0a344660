// A tile quantized along tokens: amax -> scale -> convert -> transpose -> store. Where its quads come from and where
// its columns go is the operation's.

#ifndef JAX_TSQ_CUDA_TILE_COLUMNS_CUH_
#define JAX_TSQ_CUDA_TILE_COLUMNS_CUH_

#include <cstdint>

#include "core/numerics.h"
#include "cuda/tile/amax.cuh"
#include "cuda/tile/convert.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/store_columns.cuh"

namespace jax_tsq::cuda {

// Called by all threads of a block. `source` is called with a turn, and with the row and the column of the thread's
// first quad in the tile; it fills the turn's quad, with zeros behind `rows`. `output` says how many features there are
// and what scales are allowed. `destination` is called where the tile is stored: what it returns then occupies no
// registers before.
template <class Shape, class Source, class Output, class Destination>
__device__ __forceinline__ void QuantizeColumns(const Source& source, const Output& output, uint32_t first_column,
                                                int rows, const Destination& destination,
                                                ColumnStorage<Shape>& storage) {
  // Lanes walk along the row first.
  const uint32_t thread = threadIdx.x;
  const uint32_t row = thread / Shape::kOctets * kQuad;
  const uint32_t column = thread % Shape::kOctets * kOctet;

  uint32_t pairs[Shape::kTurns][kQuad][kPairs];
#pragma unroll
  for (int turn = 0; turn < Shape::kTurns; ++turn) source(turn, row, column, pairs[turn]);
#pragma unroll
  for (int turn = 0; turn < Shape::kTurns; ++turn) {
    ReduceColumns<Shape>(thread + turn * Shape::kThreads, column, pairs[turn], storage);
  }
  __syncthreads();

  static_assert(Shape::kTokenBlocks * Shape::kColumns <= Shape::kThreads);
  if (thread < Shape::kTokenBlocks * Shape::kColumns) {
    const uint32_t block = thread / Shape::kColumns;
    const uint32_t feature = thread % Shape::kColumns;
    const float quant_scale = QuantScale(ColumnAmax<Shape>(storage, block, feature), output.pow_2_scales);
    storage.quant_scales[block][feature % kOctet / 2][feature / kOctet][feature % 2] = quant_scale;
    const ColumnDestination target = destination();
    const auto features = static_cast<uint32_t>(output.features);
    if (first_column + feature < features && static_cast<int>(block * kBlock) < target.tokens) {
      target.dequant_scales[uint64_t{block} * features + first_column + feature] = 1.0f / quant_scale;
    }
  }
  __syncthreads();

  // Blocks behind the end of a short expert are not stored.
  if (!(Shape::kShortExperts && Shape::kTokenBlocks > 1) || static_cast<int>(row / kBlock * kBlock) < rows) {
#pragma unroll
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      ConvertColumns<Shape>(row + turn * Shape::kTurnTokens, column, pairs[turn], storage);
    }
  }
  __syncthreads();

  StoreColumns<Shape>(static_cast<uint32_t>(output.features), first_column, destination(), storage);
}

// The same for a tile of zeros.
template <class Shape>
__device__ __forceinline__ void StoreEmptyColumns(uint32_t features, uint32_t first_column,
                                                  const ColumnDestination& destination,
                                                  const TileWords<Shape>& storage) {
  const uint32_t column = first_column + threadIdx.x;
  if (threadIdx.x < Shape::kColumns && column < features) {
#pragma unroll
    for (int block = 0; block < Shape::kTokenBlocks; ++block) {
      if (block * kBlock < destination.tokens) destination.dequant_scales[uint64_t{features} * block + column] = 1.0f;
    }
  }
  StoreColumns<Shape, true>(features, first_column, destination, storage);
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_COLUMNS_CUH_
