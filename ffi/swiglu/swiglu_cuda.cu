// How the tiles of swiglu_quantize map to rows.

#include <algorithm>
#include <cstdint>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/swiglu.cuh"
#include "swiglu/swiglu.h"

namespace jax_tsq::cuda {
namespace {

template <bool limited, int rows, int threads, int tiles, int ctas_per_sm>
struct SwigluShape {
  static constexpr bool kLimited = limited;
  static constexpr int kRows = rows;  // of a thread
  static constexpr int kThreads = threads;
  static constexpr int kTileRows = threads / kRowLanes * rows;
  static constexpr int kTiles = tiles;  // of a thread block
  static constexpr int kCtasPerSm = ctas_per_sm;
};

// The tiles of a batch walk the features first, so that whole rows are read and written. A thread block takes every
// n-th of them, where there are n blocks for the batch.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(Shape::kCtasPerSm, true))
    SwigluKernel(const __grid_constant__ SwigluProblem problem, const __grid_constant__ Divisor blocks,
                 const __grid_constant__ Divisor column_tiles, const __grid_constant__ uint32_t tiles) {
  __shared__ uint32_t sum;

  const SwigluInput& input = problem.input;
  const uint32_t batch = blocks.Divide(blockIdx.x);
  const uint32_t first_tile = blockIdx.x - batch * blocks.value;
  const auto tokens = static_cast<uint32_t>(input.tokens);
  const auto features = static_cast<uint32_t>(input.features);
  if (threadIdx.x < kWarp) {
    const uint32_t last_tile = min(first_tile + (Shape::kTiles - 1) * blocks.value, tiles - 1);
    const uint32_t end_row = (column_tiles.Divide(last_tile) + 1) * Shape::kTileRows;
    const GroupSizes groups = {input.group_sizes, input.groups, tokens, false};
    const uint32_t rows =
        VisitGroups(groups, batch, [&](const Group& group) { return group.first_row + group.rows >= end_row; });
    if (threadIdx.x == 0) sum = rows;
  }
  __syncthreads();

  const uint32_t row = threadIdx.x / kRowLanes * Shape::kRows;
  const uint32_t column = threadIdx.x % kRowLanes * kOctet;
  const int64_t batch_row = batch * input.tokens;
#pragma unroll 1
  for (int i = 0; i < Shape::kTiles; ++i) {
    const uint32_t tile = first_tile + i * blocks.value;
    if (tile >= tiles) return;
    const uint32_t row_tile = column_tiles.Divide(tile);
    const uint32_t column_tile = tile - row_tile * column_tiles.value;
    const uint32_t first_row = row_tile * Shape::kTileRows;
    const RowDestination destination = {
        problem.values + (batch_row + first_row) * features + column_tile * kBlock, features,
        problem.dequant_scales + (int64_t{batch} * column_tiles.value + column_tile) * tokens + first_row,
        static_cast<int>(min(tokens - first_row, Shape::kTileRows)), kBlock};
    if (sum <= first_row) {
      StoreEmptyRows<true, Shape::kRows>(row, destination);
      continue;
    }
    const int rows = static_cast<int>(min(sum - first_row, Shape::kTileRows));
    const Input gate_up = {InputType::kBf16, input.gate_up, nullptr, 0, 0, 2 * input.features, false};
    const TileSource gates = {batch_row + first_row, rows, column_tile * kBlock, 0, 0};
    const TileSource ups = {batch_row + first_row, rows, features + column_tile * kBlock, 0, 0};
    using Access = RowAccess<InputType::kBf16, true>;
    uint32_t pairs[Shape::kRows][kPairs], up[Shape::kRows][kPairs];
    float weight[Shape::kRows];
    LoadPairs<Access>(gate_up, gates, row, column, pairs);
    LoadPairs<Access>(gate_up, ups, row, column, up);
    LoadWeights(input.weights, batch_row + first_row + row, rows - static_cast<int>(row), weight);
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        pairs[r][j] = SwigluPair<Shape::kLimited>(pairs[r][j], up[r][j], weight[r], input.limit);
    }
    QuantizeRows<true>(pairs, input.pow_2_scales, row, destination);
  }
}

template <class Shape>
const char* Launch(const SwigluProblem& problem, Stream stream) {
  const SwigluInput& input = problem.input;
  const int64_t column_tiles = input.features / kBlock;
  const int64_t tiles = column_tiles * CeilDiv(input.tokens, Shape::kTileRows);
  const int64_t blocks = CeilDiv(tiles, Shape::kTiles);
  if (tiles > kMaxThreadBlocks || blocks > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  SwigluKernel<Shape><<<static_cast<unsigned>(input.batch * blocks), Shape::kThreads, 0, stream>>>(
      problem, Divisor(blocks), Divisor(column_tiles), static_cast<uint32_t>(tiles));
  return LaunchError();
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* SwigluOnCuda(const SwigluProblem& problem, Stream stream) {
  const SwigluInput& input = problem.input;
  if (input.batch == 0 || input.tokens == 0 || input.features == 0) return nullptr;
  if (std::max({2 * input.features, input.tokens, input.groups}) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features, tokens or groups";
  }
  return input.limit == kNoLimit ? cuda::Launch<cuda::SwigluShape<false, 2, 256, 4, 6>>(problem, stream)
                                 : cuda::Launch<cuda::SwigluShape<true, 2, 256, 4, 6>>(problem, stream);
}

}  // namespace jax_tsq
