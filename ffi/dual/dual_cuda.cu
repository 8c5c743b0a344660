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

// Keeps the compiler from holding float forms of the pairs, made for the rows, until the columns need them.
template <int kRows>
__device__ __forceinline__ void ForgetFloats(uint32_t (&pairs)[kRows][kPairs]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) asm volatile("" : "+r"(pairs[r][i]));
  }
}

// The first blocks write the padded sizes, one for each batch; the others a tile each. A tile holds blocks of the
// padded result, whose rows are written where they are in x. Rows past the sum of the sizes are in no group: of them, a
// tile writes those whose number in x is its own number in the padded result.
template <bool rows_aligned, class Shape, int ctas_per_sm, bool stream_rows = false>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(ctas_per_sm, false))
    DualKernel(const __grid_constant__ DualProblem problem, const __grid_constant__ GroupSizes groups,
               const __grid_constant__ Divisor column_tiles, const __grid_constant__ Divisor token_tiles) {
  static_assert(Shape::kColumns == kBlock);
  __shared__ ColumnStorage<Shape> storage;
  __shared__ Slot slots[Shape::kTokenBlocks];
  __shared__ uint32_t sum;

  const Input& input = problem.input;
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
  const uint32_t token = (batch_tile - batch * token_tiles.value) * Shape::kTokens;

  const uint32_t warp = threadIdx.x / kWarp;
  if (warp < Shape::kTokenBlocks) {
    Slot& slot = slots[warp];
    const uint32_t slot_token = token + warp * kBlock;
    if (threadIdx.x % kWarp == 0) slot = {0, 0, slot_token, kBlock, 0};
    __syncwarp();
    // A group that reaches so far in x reaches at least as far in the padded result.
    const uint32_t rows = VisitGroups(groups, batch, [&](const Group& group) {
      FillSlot(group, slot_token, slot);
      return group.first_row + group.rows >= token + Shape::kTokens;
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

  const uint32_t end_row = min(token + Shape::kTokens, tokens);
  if (sum < end_row) {
    const uint32_t first_row = max(sum, token);
    const RowDestination destination = {row_values + uint64_t{first_row} * features, features,
                                        row_dequant_scales + first_row, static_cast<int>(end_row - first_row), columns};
#pragma unroll
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      const uint32_t row = threadIdx.x / kRowLanes * kQuad + turn * Shape::kTurnTokens;
      StoreEmptyRows<rows_aligned, stream_rows, kQuad>(row, destination);
    }
  }

  const auto padded_tokens = static_cast<uint32_t>(problem.padded_tokens);
  if (token >= padded_tokens) return;
  const auto destination = [&]() -> ColumnDestination {
    uint8_t* values = problem.column_values + batch * input.features * problem.padded_tokens;
    const int64_t block = batch * (problem.padded_tokens / kBlock) + token / kBlock;
    const uint32_t values_left = Shape::kTokenBlocks == 1 ? Shape::kTokens : padded_tokens - token;
    return {values + token, padded_tokens, static_cast<int>(min(values_left, uint32_t{Shape::kTokens})),
            problem.column_dequant_scales + block * input.features};
  };
  bool empty = true;
#pragma unroll
  for (const Slot& slot : slots) empty &= slot.rows == 0;
  if (empty) {
    StoreEmptyColumns<Shape>(features, first_column, destination(), storage);
    return;
  }
  const auto load = [&](uint32_t row, uint32_t column, uint32_t (&pairs)[kQuad][kPairs]) {
    const Slot& slot = slots[Shape::kTokenBlocks == 1 ? 0 : row / kBlock];
    const TileSource source = {batch_row + slot.first_row, slot.rows, first_column, batch_row,
                               batch_row + slot.end_row};
    LoadPairs<RowAccess<InputType::kBf16, rows_aligned>>(input, source, row % kBlock, column, pairs);
    const RowDestination destination = {row_values + uint64_t{slot.first_row} * features, features,
                                        row_dequant_scales + slot.first_row, slot.rows, columns};
    QuantizeRows<rows_aligned, stream_rows>(pairs, input.pow_2_scales, row % kBlock, destination);
    ForgetFloats(pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, Shape::kTokens, destination, storage);
}

template <bool rows_aligned, class Shape, int ctas_per_sm, bool stream_rows = false>
const char* Launch(const DualProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const int64_t column_tiles = CeilDiv(input.features, kBlock);
  // Without groups, the padded result may have less rows than x.
  const int64_t token_tiles = CeilDiv(std::max(problem.padded_tokens, input.tokens), Shape::kTokens);
  const int64_t blocks_per_batch = 1 + token_tiles * column_tiles;
  if (blocks_per_batch > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  const GroupSizes groups = {problem.group_sizes, static_cast<uint32_t>(problem.groups),
                             static_cast<uint32_t>(input.tokens), problem.aligned};
  // No tile exists where a divisor would be 0.
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(std::max<int64_t>(value, 1))); };
  DualKernel<rows_aligned, Shape, ctas_per_sm, stream_rows>
      <<<static_cast<unsigned>(input.batch * blocks_per_batch), Shape::kThreads, 0, stream>>>(
          problem, groups, divisor(column_tiles), divisor(token_tiles));
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
