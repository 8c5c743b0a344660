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
                 const __grid_constant__ Divisor column_tiles, const __grid_constant__ Divisor token_blocks) {
  static_assert(Shape::kTokenBlocks == 1);
  __shared__ ColumnStorage<Shape> storage;
  __shared__ Slot slot;

  const Input& input = problem.input;
  if (blockIdx.x < input.batch) {
    if (threadIdx.x >= kWarp) return;
    WritePaddedSizes(groups, blockIdx.x, problem.padded_sizes);
    return;
  }

  // Consecutive blocks walk the features first: whole rows are read, and the output lines that neighbouring token
  // blocks share meet in L2.
  const uint32_t tile = blockIdx.x - static_cast<uint32_t>(input.batch);
  const uint32_t batch_block = column_tiles.Divide(tile);
  const uint32_t first_column = (tile - batch_block * column_tiles.value) * Shape::kColumns;
  const uint32_t batch = token_blocks.Divide(batch_block);
  const uint32_t token = (batch_block - batch * token_blocks.value) * kBlock;

  if (threadIdx.x < kWarp) FindSlot(groups, batch, token, slot);
  __syncthreads();

  const int64_t batch_row = batch * input.tokens;
  const TileSource source = {batch_row + slot.first_row, slot.rows, first_column, batch_row, batch_row + slot.end_row};
  const auto destination = [&]() -> ColumnDestination {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    float* dequant_scales = problem.dequant_scales + int64_t{batch_block} * input.features;
    if (!problem.flat) return {values + token, static_cast<uint32_t>(problem.padded_tokens), kBlock, dequant_scales};
    return {values + input.features * slot.start + (token - slot.start), slot.padded, kBlock, dequant_scales};
  };
  const auto features = static_cast<uint32_t>(input.features);
  if (slot.rows == 0) {
    StoreEmptyColumns<Shape>(features, first_column, destination(), storage);
    return;
  }
  const auto load = [&](uint32_t row, uint32_t column, uint32_t (&pairs)[kQuad][kPairs]) {
    LoadPairs<Access>(input, source, row, column, pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, source.rows, destination, storage);
}

struct Variant {
  InputType type;
  bool rows_aligned;
  bool stores_aligned;
  int64_t most_tokens;  // of an average group
  int columns;
  int threads;
  void (*kernel)(RaggedProblem, GroupSizes, Divisor, Divisor);
};

template <InputType type, bool rows_aligned, bool stores_aligned, int columns, int ctas_per_sm>
constexpr Variant MakeVariant(int64_t most_tokens) {
  using Access = RowAccess<type, rows_aligned>;
  using Shape = TileShape<stores_aligned ? kVectorBytes : 1, 1, columns>;
  return {type,
          rows_aligned,
          stores_aligned,
          most_tokens,
          columns,
          Shape::kThreads,
          RaggedKernel<Access, Shape, ctas_per_sm>};
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

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* RaggedOnCuda(const RaggedProblem& problem, Stream stream) {
  const Input& input = problem.input;
  const bool no_values = input.features == 0 || problem.padded_tokens == 0;
  if (input.batch == 0 || (no_values && problem.groups == 0)) return nullptr;
  if (std::max({input.features, input.tokens, problem.padded_tokens, problem.groups}) > cuda::kMaxExtent) {
    return "ragged_transpose_quant: more than 2^31 - 129 features, padded tokens or groups";
  }
  const cuda::Variant& variant = cuda::ChooseVariant(problem);
  const int64_t column_tiles = CeilDiv(input.features, variant.columns);
  const int64_t token_blocks = problem.padded_tokens / kBlock;
  const int64_t blocks_per_batch = 1 + token_blocks * column_tiles;
  if (blocks_per_batch > cuda::kMaxThreadBlocks / input.batch) {
    return "ragged_transpose_quant: the problem needs more than 2^31 - 1 thread blocks";
  }
  const cuda::GroupSizes groups = {problem.group_sizes, static_cast<uint32_t>(problem.groups),
                                   static_cast<uint32_t>(input.tokens), problem.aligned};
  // No tile exists where a divisor would be 0.
  const auto divisor = [](int64_t value) { return cuda::Divisor(static_cast<uint32_t>(std::max<int64_t>(value, 1))); };
  variant.kernel<<<static_cast<unsigned>(input.batch * blocks_per_batch), variant.threads, 0, stream>>>(
      problem, groups, divisor(column_tiles), divisor(token_blocks));
  return cuda::LaunchError();
}

}  // namespace jax_tsq
