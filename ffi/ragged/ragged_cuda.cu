// How the tiles of ragged_transpose_quant map to groups whose sizes only the device knows.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile/columns.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/shape.cuh"
#include "ragged/ragged.h"

namespace jax_tsq::cuda {
namespace {

// The first blocks write the padded sizes, one for each batch; the others a tile each.
template <class Access, class Shape, int ctas_per_sm>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(ctas_per_sm, Access::kAligned))
    RaggedKernel(const __grid_constant__ RaggedProblem problem, const __grid_constant__ GroupSizes groups,
                 const __grid_constant__ Divisor column_tiles, const __grid_constant__ Divisor token_tiles) {
  __shared__ ColumnStorage<Shape> storage;
  __shared__ Slot slots[Shape::kTokenBlocks];

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
  const uint32_t first_column = (tile - batch_tile * column_tiles.value) * Shape::kColumns;
  const uint32_t batch = token_tiles.Divide(batch_tile);
  const uint32_t token = (batch_tile - batch * token_tiles.value) * Shape::kTokens;

  const uint32_t warp = threadIdx.x / kWarp;
  if (warp < Shape::kTokenBlocks) FindSlot(groups, batch, token + warp * kBlock, slots[warp]);
  __syncthreads();

  const auto features = static_cast<uint32_t>(input.features);
  const auto padded_tokens = static_cast<uint32_t>(problem.padded_tokens);
  const auto destination = [&]() -> ColumnDestination {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    const int64_t block =
        Shape::kTokenBlocks == 1 ? int64_t{batch_tile} : batch * (problem.padded_tokens / kBlock) + token / kBlock;
    float* dequant_scales = problem.dequant_scales + block * input.features;
    if constexpr (Shape::kTokenBlocks > 1) {
      const int tokens = static_cast<int>(min(padded_tokens - token, uint32_t{Shape::kTokens}));
      return {values + token, padded_tokens, tokens, dequant_scales};
    }
    if (!problem.flat) return {values + token, padded_tokens, kBlock, dequant_scales};
    const Slot& slot = slots[0];
    return {values + input.features * slot.start + (token - slot.start), slot.padded, kBlock, dequant_scales};
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
    const int64_t batch_row = batch * input.tokens;
    const TileSource source = {batch_row + slot.first_row, slot.rows, first_column, batch_row,
                               batch_row + slot.end_row};
    LoadPairs<Access>(input, source, Shape::kTokenBlocks == 1 ? row : row % kBlock, column, pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, Shape::kTokens, destination, storage);
}

struct Variant {
  InputType type;
  bool rows_aligned;
  bool stores_aligned;
  int64_t most_tokens;  // of an average group
  int token_blocks;     // more than one only where the result is not flat
  int columns;
  int threads;
  void (*kernel)(RaggedProblem, GroupSizes, Divisor, Divisor);
};

template <InputType type, bool rows_aligned, bool stores_aligned, int columns, int ctas_per_sm, int token_blocks = 1,
          int turns = 1, bool streaming = true>
constexpr Variant MakeVariant(int64_t most_tokens) {
  using Access = RowAccess<type, rows_aligned>;
  using Shape = TileShape<stores_aligned ? kVectorBytes : 1, token_blocks, columns, turns, streaming>;
  return {type,         rows_aligned, stores_aligned,  most_tokens,
          token_blocks, columns,      Shape::kThreads, RaggedKernel<Access, Shape, ctas_per_sm>};
}

// The first that fits is taken. Stores are unaligned only if the result itself is. Small groups have many blocks with
// few rows, whose search takes long beside their bytes: more thread blocks hide it.
constexpr InputType kBf16 = InputType::kBf16;
constexpr InputType kFp8 = InputType::kFp8;
constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
constexpr Variant kVariants[] = {
    MakeVariant<kBf16, true, true, 128, 4>(768),    MakeVariant<kBf16, true, true, 128, 3>(kAny),
    MakeVariant<kBf16, true, false, 128, 3>(kAny),  MakeVariant<kBf16, false, true, 128, 3>(kAny),
    MakeVariant<kBf16, false, false, 128, 3>(kAny), MakeVariant<kFp8, true, true, 128, 4>(kAny),
    MakeVariant<kFp8, true, false, 128, 4>(kAny),   MakeVariant<kFp8, false, true, 128, 4>(kAny),
    MakeVariant<kFp8, false, false, 128, 3>(kAny),
};

const Variant& ChooseVariant(const RaggedProblem& problem) {
  const bool rows_aligned = RowsAligned(problem.input);
  const bool stores_aligned = IsAligned(problem.values, kVectorBytes);
  const int64_t average = problem.input.tokens / std::max<int64_t>(problem.groups, 1);
  return *std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.type == problem.input.type && variant.rows_aligned == rows_aligned &&
           variant.stores_aligned == stores_aligned && average <= variant.most_tokens;
  });
}

const char* Launch(const Variant& variant, const RaggedProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const int64_t column_tiles = CeilDiv(input.features, variant.columns);
  const int64_t token_tiles = CeilDiv(problem.padded_tokens, kBlock * variant.token_blocks);
  const int64_t blocks_per_batch = 1 + token_tiles * column_tiles;
  if (blocks_per_batch > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  const GroupSizes groups = {problem.group_sizes, static_cast<uint32_t>(problem.groups),
                             static_cast<uint32_t>(input.tokens), problem.aligned};
  // No tile exists where a divisor would be 0.
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(std::max<int64_t>(value, 1))); };
  variant.kernel<<<static_cast<unsigned>(input.batch * blocks_per_batch), variant.threads, 0, stream>>>(
      problem, groups, divisor(column_tiles), divisor(token_tiles));
  return LaunchError();
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* RaggedOnCuda(const RaggedProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const bool no_values = input.features == 0 || problem.padded_tokens == 0;
  if (input.batch == 0 || (no_values && problem.groups == 0)) return nullptr;
  if (std::max({input.features, input.tokens, problem.padded_tokens, problem.groups}) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features, padded tokens or groups";
  }
  return cuda::Launch(cuda::ChooseVariant(problem), problem, stream);
}

}  // namespace jax_tsq
