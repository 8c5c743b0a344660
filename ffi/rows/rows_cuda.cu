// How the tiles of quantize_rows map to rows.

#include <algorithm>
#include <cstdint>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shape.cuh"
#include "rows/rows.h"

namespace jax_tsq::cuda {
namespace {

template <bool aligned, int rows, int threads, int ctas_per_sm>
struct RowsShape {
  static constexpr bool kAligned = aligned;  // every octet of x and of the result is one aligned vector
  static constexpr int kRows = rows;         // of a thread
  static constexpr int kThreads = threads;
  static constexpr int kTileRows = threads / kRowLanes * rows;
  static constexpr int kCtasPerSm = ctas_per_sm;
};

// Consecutive blocks walk the features first, so that whole rows are read and written.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(Shape::kCtasPerSm, Shape::kAligned))
    RowsKernel(const __grid_constant__ RowsProblem problem, const __grid_constant__ Divisor column_tiles,
               const __grid_constant__ Divisor row_tiles) {
  __shared__ uint32_t sum;

  const Input& input = problem.input;
  const uint32_t batch_tile = column_tiles.Divide(blockIdx.x);
  const uint32_t column_tile = blockIdx.x - batch_tile * column_tiles.value;
  const uint32_t batch = row_tiles.Divide(batch_tile);
  const uint32_t first_row = (batch_tile - batch * row_tiles.value) * Shape::kTileRows;
  const auto tokens = static_cast<uint32_t>(input.tokens);

  uint32_t end_row = tokens;  // of what is read
  if (problem.group_sizes != nullptr) {
    if (threadIdx.x < kWarp) {
      const uint32_t rows = VisitGroups(GroupsOf(problem), batch, [&](const Group& group) {
        return group.first_row + group.rows >= first_row + Shape::kTileRows;
      });
      if (threadIdx.x == 0) sum = rows;
    }
    __syncthreads();
    end_row = sum;
  }

  const uint32_t row = threadIdx.x / kRowLanes * Shape::kRows;
  const uint32_t column = threadIdx.x % kRowLanes * kOctet;
  const int64_t batch_row = batch * input.tokens;
  const int rows = static_cast<int>(min(max(end_row, first_row) - first_row, Shape::kTileRows));
  // Not to `end_row`, which is that of x where the walk was stopped.
  const TileSource source = {batch_row + first_row, rows, column_tile * kBlock, batch_row,
                             batch_row + first_row + rows};
  uint32_t pairs[Shape::kRows][kPairs];
  LoadPairs<RowAccess<InputType::kBf16, Shape::kAligned>>(input, source, row, column, pairs);

  const auto features = static_cast<uint32_t>(input.features);
  const RowDestination destination = {
      problem.values + source.first_row * features + source.first_column, features,
      problem.dequant_scales + (int64_t{batch} * column_tiles.value + column_tile) * tokens + first_row,
      static_cast<int>(min(tokens - first_row, Shape::kTileRows)),
      static_cast<int>(min(features - source.first_column, kBlock))};
  QuantizeRows<Shape::kAligned>(pairs, input.pow_2_scales, row, destination);
}

template <class Shape>
const char* Launch(const RowsProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const int64_t column_tiles = CeilDiv(input.features, kBlock);
  const int64_t row_tiles = CeilDiv(input.tokens, Shape::kTileRows);
  if (row_tiles * column_tiles > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  const auto blocks = static_cast<unsigned>(input.batch * row_tiles * column_tiles);
  RowsKernel<Shape><<<blocks, Shape::kThreads, 0, stream>>>(problem, Divisor(column_tiles), Divisor(row_tiles));
  return LaunchError();
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* RowsOnCuda(const RowsProblem& problem, Stream stream) {
  const Input& input = problem.input;
  if (input.batch == 0 || input.tokens == 0 || input.features == 0) return nullptr;
  if (std::max({input.features, input.tokens, problem.groups}) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features, tokens or groups";
  }
  const bool aligned = cuda::RowsAligned(input) && cuda::IsAligned(problem.values, cuda::kOctet);
  return aligned ? cuda::Launch<cuda::RowsShape<true, 8, 128, 8>>(problem, stream)
                 : cuda::Launch<cuda::RowsShape<false, 4, 256, 4>>(problem, stream);
}

}  // namespace jax_tsq
