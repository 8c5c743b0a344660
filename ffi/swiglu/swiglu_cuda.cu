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

constexpr int kRows = 4;  // of a thread
constexpr int kThreads = 128;
constexpr int kTileRows = kThreads / kRowLanes * kRows;

// A thread block for each tile. The tiles of a batch walk the features first, so that whole rows are read and written.
template <bool kLimited>
__global__ void __launch_bounds__(kThreads, MinCtasPerSm(8, true))
    SwigluKernel(const __grid_constant__ SwigluProblem problem, const __grid_constant__ Divisor tiles,
                 const __grid_constant__ Divisor column_tiles) {
  __shared__ uint32_t sum;  // of the sizes, or rows up to the tile's end at least

  const SwigluInput& input = problem.input;
  const uint32_t batch = tiles.Divide(blockIdx.x);
  const uint32_t tile = blockIdx.x - batch * tiles.value;
  const uint32_t row_tile = column_tiles.Divide(tile);
  const uint32_t column_tile = tile - row_tile * column_tiles.value;
  const uint32_t first_row = row_tile * kTileRows;
  const auto tokens = static_cast<uint32_t>(input.tokens);
  const auto features = static_cast<uint32_t>(input.features);
  if (threadIdx.x < kWarp) {
    const GroupSizes groups = {input.group_sizes, input.groups, tokens, false};
    const uint32_t rows = VisitGroups(
        groups, batch, [&](const Group& group) { return group.first_row + group.rows >= first_row + kTileRows; });
    if (threadIdx.x == 0) sum = rows;
  }
  __syncthreads();

  const uint32_t row = threadIdx.x / kRowLanes * kRows;
  const uint32_t column = threadIdx.x % kRowLanes * kOctet;
  const int64_t batch_row = batch * input.tokens;
  const RowDestination destination = {
      problem.values + (batch_row + first_row) * features + column_tile * kBlock, features,
      problem.dequant_scales + (int64_t{batch} * column_tiles.value + column_tile) * tokens + first_row,
      static_cast<int>(min(tokens - first_row, kTileRows)), kBlock};
  if (sum <= first_row) {
    StoreEmptyRows<true, kRows>(row, destination);
    return;
  }
  const int rows = static_cast<int>(min(sum - first_row, kTileRows));
  const Input gate_up = {InputType::kBf16, input.gate_up, nullptr, 0, 0, 2 * input.features, false};
  const TileSource gates = {batch_row + first_row, rows, column_tile * kBlock, 0, 0};
  const TileSource ups = {batch_row + first_row, rows, features + column_tile * kBlock, 0, 0};
  using Access = RowAccess<InputType::kBf16, true>;
  uint32_t pairs[kRows][kPairs], up[kRows][kPairs];
  float weight[kRows];
  LoadPairs<Access>(gate_up, gates, row, column, pairs);
  LoadPairs<Access>(gate_up, ups, row, column, up);
  LoadWeights(input.weights, batch_row + first_row + row, rows - static_cast<int>(row), weight);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) pairs[r][j] = SwigluPair<kLimited>(pairs[r][j], up[r][j], weight[r], input.limit);
  }
  QuantizeRows<true>(pairs, input.pow_2_scales, row, destination);
}

template <bool kLimited>
const char* Launch(const SwigluProblem& problem, Stream stream) {
  const SwigluInput& input = problem.input;
  const int64_t column_tiles = input.features / kBlock;
  const int64_t tiles = column_tiles * CeilDiv(input.tokens, kTileRows);
  if (tiles > kMaxThreadBlocks / input.batch) return "the problem needs more than 2^31 - 1 thread blocks";
  SwigluKernel<kLimited><<<static_cast<unsigned>(input.batch * tiles), kThreads, 0, stream>>>(problem, Divisor(tiles),
                                                                                              Divisor(column_tiles));
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
  return input.limit == kNoLimit ? cuda::Launch<false>(problem, stream) : cuda::Launch<true>(problem, stream);
}

}  // namespace jax_tsq
