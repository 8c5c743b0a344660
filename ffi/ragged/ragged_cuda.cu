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
    RaggedKernel(const __grid_constant__ RaggedProblem problem, const __grid_constant__ Divisor column_tiles,
                 const __grid_constant__ Divisor token_tiles) {
  __shared__ ColumnStorage<Shape> storage;
  __shared__ Slot slots[Shape::kTokenBlocks];

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
  const uint32_t first_column = (tile - batch_tile * column_tiles.value) * kBlock;
  const uint32_t batch = token_tiles.Divide(batch_tile);
  const uint32_t token = (batch_tile - batch * token_tiles.value) * Shape::kTokens;

  if (threadIdx.x < kWarp * Shape::kTokenBlocks) {
    const uint32_t block = Shape::kTokenBlocks == 1 ? 0 : threadIdx.x / kWarp;
    FindSlot(groups, batch, token + block * kBlock, slots[block]);
  }
  __syncthreads();

  const int64_t batch_row = batch * input.tokens;
  const auto source_of = [&](const Slot& slot) -> TileSource {
    return {batch_row + slot.first_row, slot.rows, first_column, batch_row, batch_row + slot.end_row};
  };
  const Slot& slot = slots[0];
  const TileSource source = source_of(slot);
  const auto features = static_cast<uint32_t>(input.features);
  const auto destination = [&]() -> ColumnDestination {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    const auto padded_tokens = static_cast<uint32_t>(problem.padded_tokens);
    if constexpr (Shape::kTokenBlocks > 1) {
      const int64_t block = batch * (problem.padded_tokens / kBlock) + token / kBlock;
      return {values + token, padded_tokens, static_cast<int>(min(padded_tokens - token, uint32_t{Shape::kTokens})),
              problem.dequant_scales + block * input.features};
    }
    float* dequant_scales = problem.dequant_scales + int64_t{batch_tile} * input.features;
    if (!problem.flat) return {values + token, padded_tokens, kBlock, dequant_scales};
    return {values + input.features * slot.start + (token - slot.start), slot.padded, kBlock, dequant_scales};
  };
  if (slot.rows == 0) {
    StoreEmptyColumns<Shape>(features, first_column, destination(), storage);
    return;
  }
  static_assert(Shape::kTurns == Shape::kTokenBlocks);
  const auto load = [&](int turn, uint32_t row, uint32_t column, uint32_t (&pairs)[kQuad][kPairs]) {
    LoadPairs<Access>(input, Shape::kTokenBlocks == 1 ? source : source_of(slots[turn]), row, column, pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, Shape::kTokens, destination, storage);
}

// Of every variant: the tiles are a block of features wide, and a thread takes a quad in each of their token blocks.
constexpr int kThreads = kBlock / kQuad * kBlock / kOctet;

struct Variant {
  InputType type;
  bool rows_aligned;
  bool stores_aligned;
  int64_t most_tokens;  // of an average group
  int token_blocks;     // more than one only where the result is not flat
  void (*kernel)(RaggedProblem, Divisor, Divisor);
};

template <InputType type, bool rows_aligned, bool stores_aligned, int token_blocks, int ctas_per_sm>
constexpr Variant MakeVariant(int64_t most_tokens) {
  using Access = RowAccess<type, rows_aligned>;
  using Shape = TileShape<stores_aligned ? kVectorBytes : 1, token_blocks, kBlock, token_blocks>;
  static_assert(Shape::kThreads == kThreads);
  return {type, rows_aligned, stores_aligned, most_tokens, token_blocks, RaggedKernel<Access, Shape, ctas_per_sm>};
}

// The first that fits is taken. Stores are unaligned only if the result itself is.
// * Small groups: their blocks have few rows, beside whose bytes the search takes long. More thread blocks hide it.
// * Two token blocks write longer runs of a feature.
constexpr InputType kBf16 = InputType::kBf16;
constexpr InputType kFp8 = InputType::kFp8;
constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
constexpr Variant kVariants[] = {
    MakeVariant<kBf16, true, true, 1, 4>(768),   MakeVariant<kBf16, true, true, 2, 2>(kAny),
    MakeVariant<kBf16, true, true, 1, 3>(kAny),  MakeVariant<kBf16, true, false, 1, 3>(kAny),
    MakeVariant<kBf16, false, true, 1, 3>(kAny), MakeVariant<kBf16, false, false, 1, 3>(kAny),
    MakeVariant<kFp8, true, true, 1, 4>(kAny),   MakeVariant<kFp8, true, false, 1, 4>(kAny),
    MakeVariant<kFp8, false, true, 1, 4>(kAny),  MakeVariant<kFp8, false, false, 1, 3>(kAny),
};

const Variant& ChooseVariant(const RaggedProblem& problem) {
  const bool rows_aligned = RowsAligned(problem.input);
  const bool stores_aligned = IsAligned(problem.values, kVectorBytes);
  const int64_t average = problem.input.tokens / std::max<int64_t>(problem.groups, 1);
  return *std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.type == problem.input.type && variant.rows_aligned == rows_aligned &&
           variant.stores_aligned == stores_aligned && average <= variant.most_tokens &&
           !(problem.flat && variant.token_blocks > 1);
  });
}

const char* Launch(const Variant& variant, const RaggedProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const int64_t column_tiles = CeilDiv(input.features, kBlock);
  const int64_t token_tiles = CeilDiv(problem.padded_tokens, kBlock * variant.token_blocks);
  const int64_t blocks_per_batch = 1 + token_tiles * column_tiles;
  if (blocks_per_batch > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  variant.kernel<<<static_cast<unsigned>(input.batch * blocks_per_batch), kThreads, 0, stream>>>(
      problem, Divisor(column_tiles), Divisor(token_tiles));
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
