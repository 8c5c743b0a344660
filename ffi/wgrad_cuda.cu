// The weight gradient on the tensor cores of compute capability 9.0.
//
// A thread block stays on its multiprocessor and takes one tile of some dW[e] after the other: 192 features of x by 128
// of dy. For every block of 128 tokens of the group
//
//     product[k][n] = sum over the block's tokens of x[k][t] * dy[n][t]           tensor cores
//     dw[k][n] += product[k][n] * (x_scale[k] * dy_scale[n])                      promotion, in float32
//
// Promotion, two operations for each element, is what limits the kernel. So everything else is kept away from the three
// warpgroups that do it: one warp loads operands ahead of them, one the scales of dy, and one decides which tile is
// next.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "launch.cuh"
#include "ragged.h"
#include "wgrad.h"
#include "wgrad_ptx.cuh"

namespace jax_tsq {
namespace {

constexpr int kLanes = 32;
constexpr int kWarpgroup = 128;

// The tile. 256 x 128 with two promoting warpgroups needs fewer cycles, but the power limit then lowers the clock.
constexpr int kPromoters = 3;  // warpgroups
constexpr int kRows = 64;      // of each: features of x
constexpr int kTileRows = kPromoters * kRows;
constexpr int kTileColumns = 128;  // features of dy
constexpr int kStages = 4;         // blocks of tokens in flight; 3 are slower
constexpr int kThreads = kWarpgroup * (1 + kPromoters);
constexpr int kFeedRegisters = 32;      // 512 threads share 65,536 registers
constexpr int kPromoteRegisters = 160;  // 64 sums, 64 products and what is needed to get at the next

// A tile of dW is stored in chunks of 128 bytes by 64 rows, the widest that the copy engine swizzles. Two chunks of
// each warpgroup fit into shared memory beside the stages: while one is stored, the next is written.
constexpr int kChunkRowBytes = 128;
constexpr int kChunkBytes = kRows * kChunkRowBytes;

constexpr uint32_t kNoMoreTiles = UINT32_MAX;
constexpr int kListed = 2 * kLanes;  // tiles that are decided ahead: two batches of one for each lane

struct Tile {
  uint32_t blocks;  // of tokens, or kNoMoreTiles
  uint32_t group;
  uint32_t row, column;  // in dW[group]
};

struct __align__(1024) Shared {
  // Operands of each stage: one row for each feature, of 128 tokens.
  uint8_t x[kStages][kTileRows * kBlock];
  uint8_t dy[kStages][kTileColumns * kBlock];
  uint8_t chunks[kPromoters][2][kChunkBytes];
  // Scales are still read after a stage's operands have been used and its next ones are on their way: twice the stages.
  float x_scales[2][kStages][kTileRows];
  float dy_scales[2][kStages][kTileColumns];
  Tile tiles[kListed];
  Barrier full[kStages], empty[kStages];
  Barrier listed[2], unlisted[2];
  uint32_t first_block[kMostWgradGroups + 1];  // of tokens, of each group
  uint16_t by_size[kMostWgradGroups];          // groups, the largest first
};

struct Arguments {
  const float* x_scales;
  const float* dy_scales;
  const int32_t* group_sizes;
  uint32_t x_features, dy_features;
  uint32_t groups;
  uint32_t blocks;  // of tokens
};

// --- Groups and tiles ------------------------------------------------------------------------------------------------

// Writes where groups start, called by all threads. Sizes are taken as TakeGroup takes them, so that no group reaches
// past the last token, whatever the sizes are.
__device__ void PlaceGroups(const Arguments& arguments, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < arguments.groups; i += kThreads) {
    const uint32_t size = max(arguments.group_sizes[i], 0);
    shared.first_block[i] = min(size / kBlock, arguments.blocks);
  }
  __syncthreads();
  if (threadIdx.x < kLanes) {
    // Below 2^24 blocks each, so that the sum of a warp's groups and all before is below 2^30.
    uint32_t before = 0;
    for (uint32_t first = 0; first < arguments.groups; first += kLanes) {
      const uint32_t i = first + threadIdx.x;
      const uint32_t own = i < arguments.groups ? shared.first_block[i] : 0;
      uint32_t sum = own;
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        const uint32_t below = __shfl_up_sync(~0u, sum, distance);
        if (threadIdx.x >= distance) sum += below;
      }
      if (i < arguments.groups) shared.first_block[i] = min(before + sum - own, arguments.blocks);
      before = min(before + __shfl_sync(~0u, sum, kLanes - 1), arguments.blocks);
    }
    if (threadIdx.x == 0) shared.first_block[arguments.groups] = before;
  }
  __syncthreads();
}

__device__ __forceinline__ uint32_t BlocksOf(const Shared& shared, uint32_t group) {
  return shared.first_block[group + 1] - shared.first_block[group];
}

// Sorts groups by size, so that the last tiles, for which some multiprocessors have no companion, are the shortest.
__device__ void SortGroups(const Arguments& arguments, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < arguments.groups; i += kThreads) {
    const uint32_t own = BlocksOf(shared, i);
    uint32_t rank = 0;
    for (uint32_t j = 0; j < arguments.groups; ++j) {
      const uint32_t other = BlocksOf(shared, j);
      rank += other > own || (other == own && j < i);
    }
    shared.by_size[rank] = static_cast<uint16_t>(i);
  }
  __syncthreads();
}

// One warp lists the tiles of this thread block. Every thread block takes a tile of each round, in the order of their
// numbers and the next time in reverse, which evens out that tiles get shorter.
__device__ void ListTiles(const Arguments& arguments, Shared& shared) {
  const uint32_t lane = threadIdx.x % kLanes;
  const uint32_t rows = (arguments.x_features + kTileRows - 1) / kTileRows;
  const uint32_t columns = (arguments.dy_features + kTileColumns - 1) / kTileColumns;
  // What runs at the same time shall share operands in L2: the shorter side of dW is walked first.
  const bool down = rows < columns;
  for (uint32_t batch = 0;; ++batch) {
    const uint32_t round = batch * kLanes + lane;
    const uint32_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const uint32_t number = round * gridDim.x + place;
    const uint32_t rank = number / (rows * columns);
    const uint32_t within = number % (rows * columns);
    Tile tile = {kNoMoreTiles, 0, 0, 0};
    if (rank < arguments.groups) {
      tile.group = shared.by_size[rank];
      tile.blocks = BlocksOf(shared, tile.group);
      tile.row = (down ? within % rows : within / columns) * kTileRows;
      tile.column = (down ? within / rows : within % columns) * kTileColumns;
    }
    Wait(shared.unlisted[batch % 2], batch / 2 % 2 ^ 1);
    shared.tiles[batch % 2 * kLanes + lane] = tile;
    Arrive(shared.listed[batch % 2]);
    if (__any_sync(~0u, tile.blocks == kNoMoreTiles)) return;
  }
}

// A warp's way through the list.
class TileReader {
 public:
  __device__ __forceinline__ explicit TileReader(Shared& shared) : shared_(shared) {}

  __device__ __forceinline__ Tile Next() {
    const uint32_t batch = next_ / kLanes;
    if (next_ % kLanes == 0) {
      if (batch > 0 && threadIdx.x % kLanes == 0) Arrive(shared_.unlisted[(batch - 1) % 2]);
      Wait(shared_.listed[batch % 2], batch / 2 % 2);
    }
    const Tile tile = shared_.tiles[next_++ % kListed];
    __syncwarp();
    return tile;
  }

 private:
  Shared& shared_;
  uint32_t next_ = 0;
};

// --- Stages ----------------------------------------------------------------------------------------------------------

// Calls visit(stage, parity) for each block of a tile. Every tile starts at stage 0 and leaves out what remains of the
// last round, so that the stage is known at compile time: no address depends on it at run time. Bit i of `parities` is
// that of stage i.
template <int kStage>
using Stage = std::integral_constant<int, kStage>;
static_assert(kStages == 4);

template <class Visit>
__device__ __forceinline__ void ForEachBlock(uint32_t blocks, uint32_t& parities, const Visit& visit) {
  uint32_t block = 0;
  const auto step = [&](auto stage) {
    visit(block, stage.value, parities >> stage.value & 1);
    parities ^= 1u << stage.value;
    return ++block == blocks;
  };
  if (blocks == 0) return;
  while (!(step(Stage<0>()) || step(Stage<1>()) || step(Stage<2>()) || step(Stage<3>()))) {
  }
}

// One thread loads the operands, and the scales of x beside them.
__device__ void LoadOperands(const CUtensorMap& x, const CUtensorMap& dy, const Arguments& arguments, Shared& shared) {
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    const uint32_t first_block = shared.first_block[tile.group];
    const uint32_t scale_bytes = min(arguments.x_features - tile.row, uint32_t{kTileRows}) * sizeof(float);
    ForEachBlock(tile.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      Barrier& full = shared.full[stage];
      Wait(shared.empty[stage], parity ^ 1);
      if (threadIdx.x % kLanes != 0) return;
      const uint32_t token_block = first_block + block;
      ArriveAndExpect(full, sizeof(shared.x[stage]) + sizeof(shared.dy[stage]) + scale_bytes);
      LoadTile(shared.x[stage], x, token_block * kBlock, tile.row, full);
      LoadTile(shared.dy[stage], dy, token_block * kBlock, tile.column, full);
      LoadBytes(shared.x_scales[parity][stage],
                arguments.x_scales + int64_t{token_block} * arguments.x_features + tile.row, scale_bytes, full);
    });
  }
}

// Where the scale of an even column of a tile is stored. A thread's product is in columns 8 j + 2 q and the next, for
// its q and j = 0 ... 15: four of its scales are side by side, those for one j and the next.
__device__ __forceinline__ int ScalePosition(int column) {
  const int j = column / 8;
  const int q = column / 2 % 4;
  return j / 2 * 16 + q * 4 + j % 2 * 2;
}

// One warp loads the scales of dy, four for each lane.
__device__ void LoadColumnScales(const Arguments& arguments, Shared& shared) {
  const int column = threadIdx.x % kLanes * 4;
  const int position = ScalePosition(column);
  const int next_position = ScalePosition(column + 2);
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    const bool exists = tile.column + column < arguments.dy_features;
    const float* scales = arguments.dy_scales + int64_t{shared.first_block[tile.group]} * arguments.dy_features;
    if (exists) scales += tile.column + column;
    ForEachBlock(tile.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      Wait(shared.empty[stage], parity ^ 1);
      float* to = shared.dy_scales[parity][stage];
      CopyPair(to + position, scales, exists);
      CopyPair(to + next_position, scales + (exists ? 2 : 0), exists);
      ArriveAfterCopies(shared.full[stage]);
      scales += arguments.dy_features;
    });
  }
}

// --- Promotion -------------------------------------------------------------------------------------------------------

// Writes a warpgroup's sums to dW, a chunk at a time. Of a chunk's rows a thread has two, 8 apart, and of every 8
// columns two: 2 q and the next.
template <class T>
__device__ __forceinline__ void Store(const CUtensorMap& dw, const Tile& tile, int warpgroup, const float (&sums)[64],
                                      Shared& shared) {
  constexpr int kColumns = kChunkRowBytes / sizeof(T);
  const int thread = threadIdx.x % kWarpgroup;
  const int row = thread / kLanes * 16 + thread % kLanes / 4;
  const int q = thread % 4;
#pragma unroll
  for (int chunk = 0; chunk < kTileColumns / kColumns; ++chunk) {
    uint8_t* const bytes = shared.chunks[warpgroup][chunk % 2];
    if (thread == 0) WaitForStores<1>();  // the chunk's former content is on its way
    SyncWarpgroup(warpgroup);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* sum = sums + (chunk * kColumns / 8 + j) * 4;
      // Within 8 rows, the copy engine exchanges pieces of 16 bytes: number i of row r is at i ^ r.
      const int byte = (8 * j + 2 * q) * sizeof(T);
      uint8_t* const to = bytes + row * kChunkRowBytes + ((byte / 16 ^ row % 8) * 16 + byte % 16);
      if constexpr (sizeof(T) == sizeof(float)) {
        *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
        *reinterpret_cast<float2*>(to + 8 * kChunkRowBytes) = make_float2(sum[2], sum[3]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[0], sum[1]);
        *reinterpret_cast<__nv_bfloat162*>(to + 8 * kChunkRowBytes) = __floats2bfloat162_rn(sum[2], sum[3]);
      }
    }
    FenceSharedWrites();
    SyncWarpgroup(warpgroup);
    if (thread == 0) StoreTile(dw, tile.column + chunk * kColumns, tile.row + warpgroup * kRows, tile.group, bytes);
  }
}

template <class T>
__device__ void Promote(const CUtensorMap& dw, int warpgroup, Shared& shared) {
  const int lane = threadIdx.x % kLanes;
  const int row = threadIdx.x / kLanes * 16 % kRows + lane / 4 + warpgroup * kRows;
  const int q = lane % 4;
  const uint32_t x = __shfl_sync(~0u, Descriptor(shared.x[0] + warpgroup * kRows * kBlock), 0);
  const uint32_t dy = Descriptor(shared.dy[0]);
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    float sums[64];
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    ForEachBlock(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      float product[64];
      Wait(shared.full[stage], parity);
      StartProduct(product, x + stage * (sizeof(shared.x[0]) >> 4), dy + stage * (sizeof(shared.dy[0]) >> 4));
      const float upper = shared.x_scales[parity][stage][row];
      const float lower = shared.x_scales[parity][stage][row + 8];
      const float4* const columns = reinterpret_cast<const float4*>(shared.dy_scales[parity][stage]) + q;
      FinishProduct(product);
      if (lane == 0) Arrive(shared.empty[stage]);
#pragma unroll
      for (int i = 0; i < 64; i += 8) {
        const float4 scale = columns[i / 2];
        sums[i] = fmaf(product[i], upper * scale.x, sums[i]);
        sums[i + 1] = fmaf(product[i + 1], upper * scale.y, sums[i + 1]);
        sums[i + 2] = fmaf(product[i + 2], lower * scale.x, sums[i + 2]);
        sums[i + 3] = fmaf(product[i + 3], lower * scale.y, sums[i + 3]);
        sums[i + 4] = fmaf(product[i + 4], upper * scale.z, sums[i + 4]);
        sums[i + 5] = fmaf(product[i + 5], upper * scale.w, sums[i + 5]);
        sums[i + 6] = fmaf(product[i + 6], lower * scale.z, sums[i + 6]);
        sums[i + 7] = fmaf(product[i + 7], lower * scale.w, sums[i + 7]);
      }
    });
    Store<T>(dw, tile, warpgroup, sums, shared);
  }
  if (threadIdx.x % kWarpgroup == 0) WaitForStores<0>();
}

// --- The kernel ------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    WgradKernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dy,
                const __grid_constant__ CUtensorMap dw, const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  // Uniform, as the compiler has to know before it gives registers away.
  const int warp = __shfl_sync(~0u, threadIdx.x / kLanes, 0);

  if (threadIdx.x == 0) {
    constexpr int kPromotingWarps = kPromoters * kWarpgroup / kLanes;
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(shared.full[i], 1 + kLanes);  // LoadOperands and the lanes of LoadColumnScales
      InitBarrier(shared.empty[i], kPromotingWarps);
    }
    for (int i = 0; i < 2; ++i) {
      InitBarrier(shared.listed[i], kLanes);
      InitBarrier(shared.unlisted[i], kPromotingWarps + 2);  // and the two loading warps
    }
    FenceBarrierInit();
  }
  PlaceGroups(arguments, shared);
  SortGroups(arguments, shared);

  if (warp < kWarpgroup / kLanes) {
    LeaveRegisters<kFeedRegisters>();
    if (warp == 0) LoadOperands(x, dy, arguments, shared);
    if (warp == 1) LoadColumnScales(arguments, shared);
    if (warp == 2) ListTiles(arguments, shared);
  } else {
    TakeRegisters<kPromoteRegisters>();
    Promote<T>(dw, warp / (kWarpgroup / kLanes) - 1, shared);
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// The driver's function that makes tensor maps, found at run time: the module must load without a driver.
const char* FindEncoder(decltype(&cuTensorMapEncodeTiled)& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess) return "the CUDA driver has no cuTensorMapEncodeTiled";
  encode = reinterpret_cast<decltype(encode)>(function);
  return nullptr;
}

}  // namespace

const char* WgradOnCuda(const WgradProblem& problem, CUstream_st* stream) {
  if (problem.batch * problem.groups * problem.x_features * problem.dy_features == 0) return nullptr;
  const int64_t element = problem.dw_is_bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
  const int64_t dw_elements = problem.groups * problem.x_features * problem.dy_features;  // of a batch
  if (problem.tokens == 0) {
    const cudaError_t error = cudaMemsetAsync(problem.dw, 0, problem.batch * dw_elements * element, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

  int device, major, minor, multiprocessors;
  for (const cudaError_t error :
       {cudaGetDevice(&device), cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)}) {
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  if (major != 9 || minor != 0) return "the kernel needs compute capability 9.0";
  const auto kernel = problem.dw_is_bf16 ? WgradKernel<__nv_bfloat16> : WgradKernel<float>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  decltype(&cuTensorMapEncodeTiled) encode;
  if (const char* message = FindEncoder(encode)) return message;

  const int64_t tiles =
      problem.groups * CeilDiv(problem.x_features, kTileRows) * CeilDiv(problem.dy_features, kTileColumns);
  const auto thread_blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  for (int64_t batch = 0; batch < problem.batch; ++batch) {
    const int64_t token_blocks = problem.tokens / kBlock;
    const auto tensor = [&](CUtensorMap& map, CUtensorMapDataType type, int rank, const void* data, int64_t element,
                            std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> box) {
      cuuint64_t extents[3], strides[3];
      cuuint32_t boxes[3], steps[3] = {1, 1, 1};
      std::copy(sizes.begin(), sizes.end(), extents);
      std::copy(box.begin(), box.end(), boxes);
      int64_t stride = element;
      for (int i = 0; i + 1 < rank; ++i) strides[i] = stride *= sizes.begin()[i];
      return encode(&map, type, rank, const_cast<void*>(data), extents, strides, boxes, steps,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    };
    const int64_t tokens = problem.tokens;
    CUtensorMap x, dy, dw;
    if (!tensor(x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, problem.x + batch * problem.x_features * tokens, 1,
                {tokens, problem.x_features}, {kBlock, kTileRows}) ||
        !tensor(dy, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, problem.dy + batch * problem.dy_features * tokens, 1,
                {tokens, problem.dy_features}, {kBlock, kTileColumns}) ||
        !tensor(dw, problem.dw_is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3,
                static_cast<uint8_t*>(problem.dw) + batch * dw_elements * element, element,
                {problem.dy_features, problem.x_features, problem.groups}, {kChunkRowBytes / element, kRows, 1})) {
      return "a tensor map could not be made: the arrays are not aligned to 16 bytes, or too large";
    }
    const Arguments arguments = {problem.x_scales + batch * token_blocks * problem.x_features,
                                 problem.dy_scales + batch * token_blocks * problem.dy_features,
                                 problem.group_sizes + batch * problem.groups,
                                 static_cast<uint32_t>(problem.x_features),
                                 static_cast<uint32_t>(problem.dy_features),
                                 static_cast<uint32_t>(problem.groups),
                                 static_cast<uint32_t>(token_blocks)};
    kernel<<<thread_blocks, kThreads, sizeof(Shared), stream>>>(x, dy, dw, arguments);
    if (const char* message = LaunchError()) return message;
  }
  return nullptr;
}

}  // namespace jax_tsq
