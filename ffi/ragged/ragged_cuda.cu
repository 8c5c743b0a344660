// How the tiles of ragged_transpose_quant map to groups whose sizes only the device knows.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/tile/tile.cuh"
#include "ragged/ragged.h"

namespace jax_tsq {
namespace {

// Most group sizes that a lane reads at once, so that 256 groups are one step of a warp.
constexpr uint32_t kSizesPerLane = 8;

__device__ __forceinline__ uint32_t Pad(uint32_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

struct Group {
  uint32_t index;
  uint32_t first_row;  // of this batch's x
  uint32_t rows;
  uint32_t padded_start;  // in tokens of the result
};

// Sum of `value` <= `limit` over the lanes up to this one, or `limit` if it is larger.
__device__ __forceinline__ uint32_t PrefixSum(uint32_t value, uint32_t limit) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value = min(value + below, limit);
  }
  return value;
}

// Called by one warp: `visit` sees each group of a batch once, on some lane, until it returns true, and perhaps empty
// groups past the last. Sums of sizes stop at the tokens of x, which gives each group what TakeGroup gives it and keeps
// them within 32 bits.
template <class Visit>
__device__ __forceinline__ void VisitGroups(const RaggedProblem& problem, int64_t batch, const Visit& visit) {
  const int32_t* sizes = problem.group_sizes + batch * problem.groups;
  const auto groups = static_cast<uint32_t>(problem.groups);
  const auto tokens = static_cast<uint32_t>(problem.input.tokens);
  const uint32_t whole = problem.aligned ? ~(kBlock - 1u) : ~0u;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t sizes_per_lane = min((groups + kWarp - 1) / kWarp, kSizesPerLane);
  uint32_t rows_before = 0;
  uint32_t padded_before = 0;
  for (uint32_t chunk = 0; chunk < groups; chunk += kWarp * sizes_per_lane) {
    const uint32_t first = chunk + lane * sizes_per_lane;
    uint32_t size[kSizesPerLane];
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      const bool exists = i < sizes_per_lane && first + i < groups;
      size[i] = exists ? static_cast<uint32_t>(max(__ldg(sizes + first + i), 0)) & whole : 0;
    }

    // Rows of all groups before the lane's
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      sum += min(size[i], tokens - sum);
    }
    const uint32_t rows_after = min(rows_before + PrefixSum(sum, tokens), tokens);
    uint32_t first_row = __shfl_up_sync(kAllLanes, rows_after, 1);
    if (lane == 0) first_row = rows_before;

    // Padded rows of all groups before the lane's
    uint32_t row = first_row;
    uint32_t padded = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      size[i] = min(size[i], tokens - row);
      row += size[i];
      padded += Pad(size[i]);
    }
    const uint32_t padded_after = padded_before + PrefixSum(padded, UINT32_MAX);

    // Visits
    row = first_row;
    padded = padded_after - padded;
    bool done = false;
#pragma unroll
    for (uint32_t i = 0; i < kSizesPerLane; ++i) {
      if (i >= sizes_per_lane) break;
      done |= visit(Group{first + i, row, size[i], padded});
      row += size[i];
      padded += Pad(size[i]);
    }
    if (__any_sync(kAllLanes, done)) return;
    rows_before = __shfl_sync(kAllLanes, rows_after, kWarp - 1);
    padded_before = __shfl_sync(kAllLanes, padded_after, kWarp - 1);
  }
}

// What the result holds at some block of tokens.
struct Slot {
  uint32_t first_row;  // of this batch's x
  uint32_t end_row;    // of the group
  uint32_t start;      // the group's, in tokens of the result
  uint32_t padded;     // the group's
  int rows;
};

// Called by one warp. A block behind the last group is a padded group of its own, without rows.
__device__ __forceinline__ void FindSlot(const RaggedProblem& problem, int64_t batch, uint32_t token, Slot& slot) {
  if (threadIdx.x % kWarp == 0) slot = {0, 0, token, kBlock, 0};
  __syncwarp();
  VisitGroups(problem, batch, [&](const Group& group) {
    const uint32_t offset = token - group.padded_start;
    if (token < group.padded_start || offset >= Pad(group.rows)) return false;
    const int rows = static_cast<int>(min(group.rows - offset, uint32_t{kBlock}));
    slot = {group.first_row + offset, group.first_row + group.rows, group.padded_start, Pad(group.rows), rows};
    return true;
  });
}

// The first blocks write the padded sizes, one for each batch; the others a tile each.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    RaggedKernel(const __grid_constant__ RaggedProblem problem, const __grid_constant__ Divisor column_tiles,
                 const __grid_constant__ Divisor token_blocks) {
  static_assert(Shape::kTokenBlocks == 1);
  __shared__ TileStorage<Shape> storage;
  __shared__ Slot slot;

  const Input& input = problem.input;
  if (blockIdx.x < input.batch) {
    if (threadIdx.x >= kWarp) return;
    int32_t* padded_sizes = problem.padded_sizes + blockIdx.x * problem.groups;
    VisitGroups(problem, blockIdx.x, [&](const Group& group) {
      if (group.index < problem.groups) padded_sizes[group.index] = static_cast<int32_t>(Pad(group.rows));
      return false;
    });
    return;
  }

  // Consecutive blocks walk the features first: whole rows are read, and the output lines that neighbouring token
  // blocks share meet in L2.
  const uint32_t tile = blockIdx.x - static_cast<uint32_t>(input.batch);
  const uint32_t batch_block = column_tiles.Divide(tile);
  const uint32_t first_column = (tile - batch_block * column_tiles.value) * Shape::kColumns;
  const uint32_t batch = token_blocks.Divide(batch_block);
  const uint32_t token = (batch_block - batch * token_blocks.value) * kBlock;

  if (threadIdx.x < kWarp) FindSlot(problem, batch, token, slot);
  __syncthreads();

  const int64_t batch_row = batch * input.tokens;
  const TileSource source = {batch_row + slot.first_row, slot.rows, first_column, batch_row, batch_row + slot.end_row};
  const auto destination = [&]() -> TileDestination {
    uint8_t* values = problem.values + batch * input.features * problem.padded_tokens;
    float* dequant_scales = problem.dequant_scales + int64_t{batch_block} * input.features;
    if (!problem.flat) return {values + token, static_cast<uint32_t>(problem.padded_tokens), kBlock, dequant_scales};
    return {values + input.features * slot.start + (token - slot.start), slot.padded, kBlock, dequant_scales};
  };
  if (slot.rows == 0) {
    RunEmptyTile<Shape>(input, first_column, destination(), storage);
  } else {
    RunTile<Shape>(input, source, destination, storage);
  }
}

struct Variant {
  InputType type;
  bool rows_aligned;
  bool stores_aligned;
  int64_t most_tokens;  // of an average group
  int columns;
  int threads;
  void (*kernel)(RaggedProblem, Divisor, Divisor);
};

template <InputType type, bool rows_aligned, bool stores_aligned, int columns, int ctas_per_sm>
constexpr Variant MakeVariant(int64_t most_tokens) {
  using Shape = TileShape<type, rows_aligned, stores_aligned ? kVectorBytes : 1, 1, columns, ctas_per_sm>;
  return {type, rows_aligned, stores_aligned, most_tokens, columns, Shape::kThreads, RaggedKernel<Shape>};
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

const char* RaggedOnCuda(const RaggedProblem& problem, CUstream_st* stream) {
  const Input& input = problem.input;
  const bool no_values = input.features == 0 || problem.padded_tokens == 0;
  if (input.batch == 0 || (no_values && problem.groups == 0)) return nullptr;
  if (std::max({input.features, input.tokens, problem.padded_tokens, problem.groups}) > kMaxExtent) {
    return "ragged_transpose_quant: more than 2^31 - 129 features, padded tokens or groups";
  }
  const Variant& variant = ChooseVariant(problem);
  const int64_t column_tiles = CeilDiv(input.features, variant.columns);
  const int64_t token_blocks = problem.padded_tokens / kBlock;
  const int64_t blocks_per_batch = 1 + token_blocks * column_tiles;
  if (blocks_per_batch > kMaxThreadBlocks / input.batch) {
    return "ragged_transpose_quant: the problem needs more than 2^31 - 1 thread blocks";
  }
  // No tile exists where a divisor would be 0.
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(std::max<int64_t>(value, 1))); };
  variant.kernel<<<static_cast<unsigned>(input.batch * blocks_per_batch), variant.threads, 0, stream>>>(
      problem, divisor(column_tiles), divisor(token_blocks));
  return LaunchError();
}

}  // namespace jax_tsq
