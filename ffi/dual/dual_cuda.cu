// How the tiles of ragged_quantize map to groups whose sizes only the device knows.

#include <algorithm>
#include <cstdint>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile/columns.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shape.cuh"
#include "dual/dual.h"

namespace jax_tsq::cuda {
namespace {

// The first blocks write the padded sizes, one for each batch; the others a tile each. A tile holds a block of tokens
// of the padded result, whose rows are written where they are in x. Rows past the sum of the sizes are in no group: of
// them, a tile writes those whose number in x is its own number in the padded result.
template <bool rows_aligned, class Shape, int ctas_per_sm>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(ctas_per_sm, false))
    DualKernel(const __grid_constant__ DualProblem problem, const __grid_constant__ Divisor column_tiles,
               const __grid_constant__ Divisor token_tiles) {
  static_assert(Shape::kTokens == kBlock && Shape::kColumns == kBlock && Shape::kTurns == 1);
  __shared__ ColumnStorage<Shape> storage;
  __shared__ Slot slot;
  __shared__ uint32_t sum;

  const Input& input = problem.input;
  const GroupSizes groups = GroupsOf(problem);
  if (blockIdx.x < input.batch) {
    if (threadIdx.x >= kWarp) return;
    WritePaddedSizes(groups, blockIdx.x, problem.padded_sizes);
    return;
  }

  // Consecutive blocks walk the features first: whole rows are read, and the output lines that neighbouring token
  // blocks share meet in L2.
  const uint32_t tile = blockIdx.x - static_cast<uint32_t>(input.batch);
  const uint32_t batch_tile = column_tiles.Divide(tile);
  const uint32_t column_tile = tile - batch_tile * column_tiles.value;
  const uint32_t first_column = column_tile * kBlock;
  const uint32_t batch = token_tiles.Divide(batch_tile);
  const uint32_t token = (batch_tile - batch * token_tiles.value) * kBlock;

  if (threadIdx.x < kWarp) {
    if (threadIdx.x == 0) slot = {0, 0, token, kBlock, 0};
    __syncwarp();
    // A group that reaches so far in x reaches at least as far in the padded result.
    const uint32_t rows = VisitGroups(groups, batch, [&](const Group& group) {
      FillSlot(group, token, slot);
      return group.first_row + group.rows >= token + kBlock;
    });
    if (threadIdx.x == 0) sum = rows;
  }
  __syncthreads();

  const auto features = static_cast<uint32_t>(input.features);
  const auto tokens = static_cast<uint32_t>(input.tokens);
  const int64_t batch_row = batch * input.tokens;
  const int columns = static_cast<int>(min(features - first_column, kBlock));
  uint8_t* row_values = problem.row_values + batch_row * features + first_column;
  float* row_dequant_scales = problem.row_dequant_scales + (int64_t{batch} * column_tiles.value + column_tile) * tokens;

  const uint32_t end_row = min(token + kBlock, tokens);
  if (sum < end_row) {
    const uint32_t first_row = max(sum, token);
    const RowDestination destination = {row_values + uint64_t{first_row} * features, features,
                                        row_dequant_scales + first_row, static_cast<int>(end_row - first_row), columns};
    StoreEmptyRows<rows_aligned, kQuad>(threadIdx.x / kRowLanes * kQuad, destination);
  }

  const auto padded_tokens = static_cast<uint32_t>(problem.padded_tokens);
  if (token >= padded_tokens) return;
  const auto destination = [&]() -> ColumnDestination {
    uint8_t* values = problem.column_values + batch * input.features * problem.padded_tokens;
    const int64_t block = batch * (problem.padded_tokens / kBlock) + token / kBlock;
    return {values + token, padded_tokens, kBlock, problem.column_dequant_scales + block * input.features};
  };
  if (slot.rows == 0) {
    StoreEmptyColumns<Shape>(features, first_column, destination(), storage);
    return;
  }
  const auto load = [&](int, uint32_t row, uint32_t column, uint32_t (&pairs)[kQuad][kPairs]) {
    const TileSource source = {batch_row + slot.first_row, slot.rows, first_column, batch_row,
                               batch_row + slot.end_row};
    LoadPairs<RowAccess<InputType::kBf16, rows_aligned>>(input, source, row, column, pairs);
    const RowDestination destination = {row_values + uint64_t{slot.first_row} * features, features,
                                        row_dequant_scales + slot.first_row, slot.rows, columns};
    QuantizeRows<rows_aligned>(pairs, input.pow_2_scales, row, destination);
    ForgetFloats(pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, kBlock, destination, storage);
}

template <bool rows_aligned, class Shape, int ctas_per_sm>
const char* Launch(const DualProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const int64_t column_tiles = CeilDiv(input.features, kBlock);
  // Without groups, the padded result may have less rows than x.
  const int64_t token_tiles = CeilDiv(std::max(problem.padded_tokens, input.tokens), kBlock);
  const int64_t blocks_per_batch = 1 + token_tiles * column_tiles;
  if (blocks_per_batch > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  DualKernel<rows_aligned, Shape, ctas_per_sm>
      <<<static_cast<unsigned>(input.batch * blocks_per_batch), Shape::kThreads, 0, stream>>>(
          problem, Divisor(column_tiles), Divisor(token_tiles));
  return LaunchError();
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* DualOnCuda(const DualProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const bool no_values = input.features == 0 || std::max(problem.padded_tokens, input.tokens) == 0;
  if (input.batch == 0 || (no_values && problem.groups == 0)) return nullptr;
  if (std::max({input.features, input.tokens, problem.padded_tokens, problem.groups}) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features, padded tokens or groups";
  }
  const bool rows_aligned = cuda::RowsAligned(input) && cuda::IsAligned(problem.row_values, cuda::kOctet);
  const bool columns_aligned = cuda::IsAligned(problem.column_values, cuda::kVectorBytes);
  using Aligned = cuda::TileShape<cuda::kVectorBytes, 1, kBlock>;
  using Unaligned = cuda::TileShape<1, 1, kBlock>;
  if (rows_aligned) {
    return columns_aligned ? cuda::Launch<true, Aligned, 3>(problem, stream)
                           : cuda::Launch<true, Unaligned, 3>(problem, stream);
  }
  return columns_aligned ? cuda::Launch<false, Aligned, 2>(problem, stream)
                         : cuda::Launch<false, Unaligned, 2>(problem, stream);
}

}  // namespace jax_tsq
