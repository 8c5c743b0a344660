// How the tiles of swiglu_backward_quantize map to groups whose sizes only the device knows.

#include <algorithm>
#include <cstdint>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile/columns.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/swiglu.cuh"
#include "dswiglu/dswiglu.h"

namespace jax_tsq::cuda {
namespace {

using Shape = TileShape<kVectorBytes, 1, kBlock>;

// Octets of each thread's quads: gate, up and dh arrive in them, and the gradients of gate and up and h take their
// place. Once all threads have h in registers, what the quantization along columns needs takes that of h.
struct Slots {
  enum { kGate, kUp, kDh, kArrays, kH = kDh };
  uint4 octets[kArrays][kQuad][Shape::kThreads];

  __device__ ColumnStorage<Shape>& storage() { return reinterpret_cast<ColumnStorage<Shape>&>(octets[kH]); }
};
static_assert(sizeof(ColumnStorage<Shape>) <= sizeof(Slots::octets) / Slots::kArrays);

// One octet of each of the rows from `address` on, to arrive in the thread's slots, each array's row by row; zeros
// where there are no rows.
__device__ __forceinline__ void FetchOctet(const uint16_t* address, bool exists, uint4& slot) {
  if (!exists) {
    slot = uint4{};
    return;
  }
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(&slot));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(address) : "memory");
}

__device__ __forceinline__ void FetchedRow() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all rows that were fetched but the last `later`.
template <int later>
__device__ __forceinline__ void WaitForRow() {
  asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

__device__ __forceinline__ void ReadOctet(const uint4& slot, uint32_t (&pairs)[kPairs]) {
  const uint4 octet = slot;
  pairs[0] = octet.x;
  pairs[1] = octet.y;
  pairs[2] = octet.z;
  pairs[3] = octet.w;
}

// Differentiates an octet of the thread; returns what it adds to the weight's gradient.
template <bool kLimited>
__device__ __forceinline__ float DifferentiateOctet(Slots& slots, int r, float weight, float limit) {
  uint32_t pairs[Slots::kArrays][kPairs];
#pragma unroll
  for (int i = 0; i < Slots::kArrays; ++i) ReadOctet(slots.octets[i][r][threadIdx.x], pairs[i]);
  float sums[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const SwigluPairGradients result =
        DifferentiatePair<kLimited>(pairs[0][i], pairs[1][i], pairs[2][i], weight, limit);
    pairs[Slots::kGate][i] = result.dgate;
    pairs[Slots::kUp][i] = result.dup;
    pairs[Slots::kH][i] = result.h;
    sums[i] = result.sum;
  }
#pragma unroll
  for (int i = 0; i < Slots::kArrays; ++i) {
    slots.octets[i][r][threadIdx.x] = make_uint4(pairs[i][0], pairs[i][1], pairs[i][2], pairs[i][3]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What QuantizeColumns asks for.
struct ColumnOutput {
  int64_t features;
  bool pow_2_scales;
};

// Where a thread block works: a block of tokens of the padded results and a block of features of h, with the two blocks
// of do1 that belong to it. It lies in shared memory, since the arithmetic leaves no registers for it.
struct Place {
  uint32_t batch, token, column_block;
  uint32_t sum;  // of the sizes, or rows up to the tile's end at least
  Slot slot;
};

// Called by one warp.
__device__ __forceinline__ void FindPlace(const GroupSizes& groups, uint32_t batch, uint32_t token,
                                          uint32_t column_block, Place& place) {
  if (threadIdx.x == 0) place = {batch, token, column_block, 0, {0, 0, token, kBlock, 0}};
  __syncwarp();
  // A group that reaches so far in x reaches at least as far in the padded results.
  const uint32_t rows = VisitGroups(groups, batch, [&](const Group& group) {
    FillSlot(group, token, place.slot);
    return group.first_row + group.rows >= token + kBlock;
  });
  if (threadIdx.x == 0) place.sum = rows;
}

// Rows from `first` on of the gradient of the gates, or of the ups.
__device__ __forceinline__ RowDestination RowsOf(const DswigluProblem& p, const Place& place, bool of_up,
                                                 uint32_t first, int rows) {
  const int64_t features = p.input.features, row = place.batch * p.input.tokens + first;
  const auto blocks = static_cast<uint32_t>(features) / kBlock;
  const uint32_t block = place.column_block + (of_up ? blocks : 0);
  return {p.row_values + row * (2 * features) + block * kBlock, static_cast<uint32_t>(2 * features),
          p.row_dequant_scales + (int64_t{place.batch} * (2 * blocks) + block) * p.input.tokens + first, rows, kBlock};
}

// Of the gradient of the weights, one for each row of the batch.
__device__ __forceinline__ float* BlockSumsOf(const DswigluProblem& p, const Place& place) {
  const auto blocks = static_cast<uint32_t>(p.input.features) / kBlock;
  return p.block_sums + (int64_t{place.batch} * blocks + place.column_block) * p.input.tokens;
}

__device__ __forceinline__ ColumnDestination ColumnsOf(const DswigluProblem& p, const Place& place, uint8_t* values,
                                                       float* dequant_scales, int64_t features) {
  const int64_t padded = p.padded_tokens;
  return {values + place.batch * features * padded + place.token, static_cast<uint32_t>(padded), kBlock,
          dequant_scales + (place.batch * (padded / kBlock) + place.token / kBlock) * features};
}

__device__ __forceinline__ ColumnDestination Do1ColumnsOf(const DswigluProblem& p, const Place& place) {
  return ColumnsOf(p, place, p.column_values, p.column_dequant_scales, 2 * p.input.features);
}

__device__ __forceinline__ ColumnDestination HColumnsOf(const DswigluProblem& p, const Place& place) {
  return ColumnsOf(p, place, p.h_values, p.h_dequant_scales, p.input.features);
}

// Blocks of the next kernel may start once all blocks of this one came here; they wait in WaitForKernelBefore.
__device__ __forceinline__ void LetNextKernelStart() {
  if constexpr (kArchitecture >= 900) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Returns once the kernel before has ended and its results can be read, though not by __ldg.
__device__ __forceinline__ void WaitForKernelBefore() {
  if constexpr (kArchitecture >= 900) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The first blocks write the padded sizes, one for each batch; the others a tile each. Rows past the sum of the sizes
// are in no group: of them, a tile writes those whose number in x is its own number in the padded results.
template <bool kLimited>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(2, false))
    DswigluKernel(const __grid_constant__ DswigluProblem problem, const __grid_constant__ Divisor column_tiles,
                  const __grid_constant__ Divisor token_tiles) {
  extern __shared__ Slots slots[];
  __shared__ Place place;

  LetNextKernelStart();
  const SwigluInput& input = problem.input;
  const auto tokens = static_cast<uint32_t>(input.tokens);
  const GroupSizes groups = {input.group_sizes, input.groups, tokens, problem.aligned};
  if (blockIdx.x < input.batch) {
    if (threadIdx.x >= kWarp) return;
    WritePaddedSizes(groups, blockIdx.x, problem.padded_sizes);
    return;
  }
  if (threadIdx.x < kWarp) {
    const uint32_t tile = blockIdx.x - static_cast<uint32_t>(input.batch);
    const uint32_t batch_tile = column_tiles.Divide(tile);
    const uint32_t batch = token_tiles.Divide(batch_tile);
    FindPlace(groups, batch, (batch_tile - batch * token_tiles.value) * kBlock, tile - batch_tile * column_tiles.value,
              place);
  }
  __syncthreads();

  const auto features = static_cast<uint32_t>(input.features);
  const uint32_t row = threadIdx.x / kRowLanes * kQuad;
  const uint32_t end_row = min(place.token + kBlock, tokens);
  if (place.sum < end_row) {
    const uint32_t first_row = max(place.sum, place.token);
    const int rows = static_cast<int>(end_row - first_row);
    StoreEmptyRows<true, kQuad>(row, RowsOf(problem, place, false, first_row, rows));
    StoreEmptyRows<true, kQuad>(row, RowsOf(problem, place, true, first_row, rows));
    if (input.weights != nullptr && static_cast<int>(threadIdx.x) < rows) {
      BlockSumsOf(problem, place)[first_row + threadIdx.x] = 0.0f;
    }
  }
  if (place.token >= problem.padded_tokens) return;
  if (place.slot.rows == 0) {
    const uint32_t first_column = place.column_block * kBlock;
    StoreEmptyColumns<Shape>(2 * features, first_column, Do1ColumnsOf(problem, place), slots->storage());
    StoreEmptyColumns<Shape>(2 * features, features + first_column, Do1ColumnsOf(problem, place), slots->storage());
    StoreEmptyColumns<Shape>(features, first_column, HColumnsOf(problem, place), slots->storage());
    return;
  }

  const int rows = place.slot.rows - static_cast<int>(row);
  const int64_t first_row = place.batch * input.tokens + place.slot.first_row + row;
  const uint32_t column = place.column_block * kBlock + threadIdx.x % kRowLanes * kOctet;
  const uint16_t* gate =
      Anchor(static_cast<const uint16_t*>(input.gate_up) + first_row * (2 * input.features) + column);
  const uint16_t* dh = Anchor(static_cast<const uint16_t*>(problem.dh) + first_row * input.features + column);
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    FetchOctet(gate + r * (2 * input.features), r < rows, slots->octets[Slots::kGate][r][threadIdx.x]);
    FetchOctet(gate + r * (2 * input.features) + input.features, r < rows, slots->octets[Slots::kUp][r][threadIdx.x]);
    FetchOctet(dh + r * input.features, r < rows, slots->octets[Slots::kDh][r][threadIdx.x]);
    FetchedRow();
  }
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    if (r == 0) WaitForRow<3>();
    if (r == 1) WaitForRow<2>();
    if (r == 2) WaitForRow<1>();
    if (r == 3) WaitForRow<0>();
    const bool weighted = input.weights != nullptr && r < rows;
    const float weight = weighted ? __ldg(input.weights + first_row + r) : 1.0f;
    const float octet_sum = DifferentiateOctet<kLimited>(*slots, r, weight, input.limit);
    if (input.weights == nullptr) continue;
    const float row_sum = SumLanes(octet_sum);
    if (threadIdx.x % kRowLanes == 0 && r < rows) {
      BlockSumsOf(problem, place)[place.slot.first_row + row + r] = WithOneNan(row_sum);
    }
  }

  const auto load_h = [&](int, uint32_t, uint32_t, uint32_t (&pairs)[kQuad][kPairs]) {
#pragma unroll
    for (int r = 0; r < kQuad; ++r) ReadOctet(slots->octets[Slots::kH][r][threadIdx.x], pairs[r]);
    __syncthreads();
  };
  QuantizeColumns<Shape>(
      load_h, ColumnOutput{input.features, input.pow_2_scales}, place.column_block * kBlock, kBlock,
      [&] { return HColumnsOf(problem, place); }, slots->storage());
#pragma unroll
  for (const bool of_up : {false, true}) {
    const auto load = [&](int, uint32_t row, uint32_t, uint32_t (&pairs)[kQuad][kPairs]) {
#pragma unroll
      for (int r = 0; r < kQuad; ++r) ReadOctet(slots->octets[of_up][r][threadIdx.x], pairs[r]);
      QuantizeRows<true>(pairs, input.pow_2_scales, row,
                         RowsOf(problem, place, of_up, place.slot.first_row, place.slot.rows));
      ForgetFloats(pairs);
    };
    QuantizeColumns<Shape>(
        load, ColumnOutput{2 * input.features, input.pow_2_scales},
        place.column_block * kBlock + (of_up ? features : 0), kBlock, [&] { return Do1ColumnsOf(problem, place); },
        slots->storage());
  }
}

constexpr int kSumThreads = 128;
constexpr int kSumLoads = 16;  // of a thread in flight

// A thread for each token adds what the blocks of features gave, in their order.
__global__ void __launch_bounds__(kSumThreads) SumBlocksKernel(const __grid_constant__ DswigluProblem problem) {
  const SwigluInput& input = problem.input;
  const int64_t index = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (index >= input.batch * input.tokens) return;
  const int64_t batch = index / input.tokens;
  const int64_t blocks = input.features / kBlock;
  const float* block_sum = problem.block_sums + batch * (blocks - 1) * input.tokens + index;
  WaitForKernelBefore();
  float total = 0.0f;
  for (int left = static_cast<int>(blocks); left > 0; left -= kSumLoads) {
    float sums[kSumLoads];
#pragma unroll
    for (int i = 0; i < kSumLoads; ++i, block_sum += input.tokens) sums[i] = i < left ? *block_sum : 0.0f;
#pragma unroll
    for (int i = 0; i < kSumLoads; ++i) total += sums[i];
  }
  problem.dweights[index] = WithOneNan(total);
}

// The kernel may start before the one that writes the blocks' sums ends, where it is compiled to wait for that.
const char* LaunchSumBlocks(const DswigluProblem& problem, int64_t sum_blocks, Stream stream) {
  cudaFuncAttributes compiled;
  if (const char* message = Message(cudaFuncGetAttributes(&compiled, SumBlocksKernel))) return message;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(sum_blocks));
  config.blockDim = dim3(kSumThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = compiled.ptxVersion >= 90 ? 1 : 0;
  return Message(cudaLaunchKernelEx(&config, SumBlocksKernel, problem));
}

template <bool kLimited>
const char* Launch(const DswigluProblem& problem, Stream stream) {
  const SwigluInput& input = problem.input;
  const int64_t column_tiles = input.features / kBlock;
  // Without groups, the padded results may have less rows than x.
  const int64_t token_tiles = CeilDiv(std::max(problem.padded_tokens, input.tokens), kBlock);
  const int64_t blocks_per_batch = 1 + token_tiles * column_tiles;
  const int64_t sum_blocks = input.weights == nullptr ? 0 : CeilDiv(input.batch * input.tokens, kSumThreads);
  if (blocks_per_batch > kMaxThreadBlocks / input.batch || sum_blocks > kMaxThreadBlocks) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  const cudaError_t error =
      cudaFuncSetAttribute(DswigluKernel<kLimited>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Slots));
  if (const char* message = Message(error)) return message;
  DswigluKernel<kLimited>
      <<<static_cast<unsigned>(input.batch * blocks_per_batch), Shape::kThreads, sizeof(Slots), stream>>>(
          problem, Divisor(column_tiles), Divisor(token_tiles));
  if (const char* message = LaunchError()) return message;
  return sum_blocks > 0 ? LaunchSumBlocks(problem, sum_blocks, stream) : nullptr;
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* DswigluOnCuda(const DswigluProblem& problem, Stream stream) {
  const SwigluInput& input = problem.input;
  const bool no_values = input.features == 0 || std::max(problem.padded_tokens, input.tokens) == 0;
  if (input.batch == 0 || (no_values && input.groups == 0 && input.weights == nullptr)) return nullptr;
  if (std::max({2 * input.features, input.tokens, problem.padded_tokens, input.groups}) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features, padded tokens or groups";
  }
  return input.limit == kNoLimit ? cuda::Launch<false>(problem, stream) : cuda::Launch<true>(problem, stream);
}

}  // namespace jax_tsq
