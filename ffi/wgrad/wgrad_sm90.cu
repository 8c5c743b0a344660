// The weight gradient on the tensor cores of compute capability 9.0.
//
// A thread block stays on its multiprocessor and takes one tile of some dW[e] after the other: 192 features of x by 128
// of dy. For every block of 128 tokens of the group
//
//     product[k][n] = sum over the block's tokens of x[k][t] * dy[n][t]           tensor cores
//     dw[k][n] += product[k][n] * (x_scale[k] * dy_scale[n])                      promotion, in float32
//
// Three warpgroups multiply and promote, each with 64 of the tile's rows: while one promotes, the tensor cores work for
// the others. Everything else is kept away from them: one warp loads operands ahead of them, two load scales, and one
// decides which tile is next.
//
// What limits it on an H100 is power, which lowers the clock; then the path to shared memory, busy for 70 to 84 % of
// the time with what the tensor cores read, with copies, and with scales, which every warp loads for itself; and in
// float32 the store, during which a warpgroup has no registers for the next tile.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "wgrad/wgrad.h"
#include "wgrad/wgrad_ptx.cuh"
#include "wgrad/wgrad_tiles.cuh"

namespace jax_tsq {
namespace {

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

// One thread loads the operands.
__device__ void LoadOperands(const CUtensorMap& x, const CUtensorMap& dy, Shared& shared) {
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    const uint32_t first_block = shared.first_block[tile.group];
    ForEachBlock(tile.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      Barrier& full = shared.full[stage];
      Wait(shared.empty[stage], parity ^ 1);
      if (threadIdx.x % kLanes != 0) return;
      const uint32_t token_block = first_block + block;
      ArriveAndExpect(full, sizeof(shared.x[stage]) + sizeof(shared.dy[stage]));
      LoadTile(shared.x[stage], x, token_block * kBlock, tile.row, full);
      LoadTile(shared.dy[stage], dy, token_block * kBlock, tile.column, full);
    });
  }
}

// One warp loads the scales of x, four or eight for each lane. It is ahead of the warpgroups by as many blocks as there
// are stages, so that nobody waits for its loads.
__device__ void LoadRowScales(const Arguments& arguments, Shared& shared) {
  constexpr int kAtOnce = kLanes * 4;
  const int row = threadIdx.x % kLanes * 4;
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    const float* scales =
        arguments.x_scales + int64_t{shared.first_block[tile.group]} * arguments.x_features + tile.row + row;
    const bool exists = tile.row + row < arguments.x_features;
    const bool more = row + kAtOnce < kTileRows && tile.row + row + kAtOnce < arguments.x_features;
    ForEachBlock(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      const float4 first = exists ? *reinterpret_cast<const float4*>(scales) : float4{};
      const float4 second = more ? *reinterpret_cast<const float4*>(scales + kAtOnce) : float4{};
      scales += arguments.x_features;
      Wait(shared.empty[stage], parity ^ 1);
      float* const to = shared.x_scales[parity][stage] + row;
      *reinterpret_cast<float4*>(to) = first;
      if (row + kAtOnce < kTileRows) *reinterpret_cast<float4*>(to + kAtOnce) = second;
      Arrive(shared.full[stage]);
    });
  }
}

// Another one loads the scales of dy. A thread's product is in columns 8 j + 2 q and the next, for its q and j = 0
// ... 15. Four of its scales are put side by side, those for an even j and for the next: it reads them at once.
__device__ void LoadColumnScales(const Arguments& arguments, Shared& shared) {
  const int lane = threadIdx.x % kLanes;
  const int column = lane * 4;
  const int position = column / 16 * 16 + column / 2 % 4 * 4 + column / 8 % 2 * 2;
  TileReader tiles(shared);
  uint32_t parities = 0;
  for (Tile tile; (tile = tiles.Next()).blocks != kNoMoreTiles;) {
    const bool exists = tile.column + column < arguments.dy_features;
    const float* scales = arguments.dy_scales + int64_t{shared.first_block[tile.group]} * arguments.dy_features +
                          (exists ? tile.column + column : 0);
    ForEachBlock(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      const float4 scale = exists ? *reinterpret_cast<const float4*>(scales) : float4{};
      scales += arguments.dy_features;
      Wait(shared.empty[stage], parity ^ 1);
      float* const to = shared.dy_scales[parity][stage] + position;
      *reinterpret_cast<float2*>(to) = make_float2(scale.x, scale.y);
      *reinterpret_cast<float2*>(to + 4) = make_float2(scale.z, scale.w);  // of the next q
      Arrive(shared.full[stage]);
    });
  }
}

// --- Promotion -------------------------------------------------------------------------------------------------------

// Writes a warpgroup's sums to dW, two chunks at a time. Of a chunk's rows a thread has two, 8 apart, and of every 8
// columns two: 2 q and the next.
template <class T>
__device__ __forceinline__ void Store(const CUtensorMap& dw, const Tile& tile, int warpgroup, const float (&sums)[64],
                                      Shared& shared) {
  constexpr int kColumns = kChunkRowBytes / sizeof(T);
  uint8_t (&chunks)[2][kChunkBytes] = shared.chunks[warpgroup];
  const int thread = threadIdx.x % kWarpgroup;
  const int row = thread / kLanes * 16 + thread % kLanes / 4;
  const int q = thread % 4;
  // Within 8 rows, the copy engine exchanges pieces of 16 bytes: number i of row r is at i ^ r. So 8 columns of float32
  // lie in the same banks for rows r and r ^ 1. A warp writes four rows at a time: odd ones take their columns in
  // another order, or they would wait for the even ones.
  const bool reorder = sizeof(T) == sizeof(float) && row % 2 != 0;
  const int exchange = row % 8 ^ (reorder ? 4 : 0);
#pragma unroll
  for (int column = 0; column < kTileColumns; column += 2 * kColumns) {
    if (thread == 0) WaitForStores();  // the chunks' former content is on its way
    SyncWarpgroup(warpgroup);
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int first = (column + chunk * kColumns) / 2 + i;
          sum[i] = reorder ? sums[first + (j ^ 2) * 4] : sums[first + j * 4];
        }
        const int byte = (8 * j + 2 * q) * sizeof(T);
        uint8_t* const to = chunks[chunk] + row * kChunkRowBytes + ((byte / 16 ^ exchange) * 16 + byte % 16);
        if constexpr (sizeof(T) == sizeof(float)) {
          *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
          *reinterpret_cast<float2*>(to + 8 * kChunkRowBytes) = make_float2(sum[2], sum[3]);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[0], sum[1]);
          *reinterpret_cast<__nv_bfloat162*>(to + 8 * kChunkRowBytes) = __floats2bfloat162_rn(sum[2], sum[3]);
        }
      }
    }
    FenceSharedWrites();
    SyncWarpgroup(warpgroup);
    if (thread == 0) {
      const int first_row = tile.row + warpgroup * kRows;
      StoreTile(dw, tile.column + column, first_row, tile.group, chunks[0]);
      StoreTile(dw, tile.column + column + kColumns, first_row, tile.group, chunks[1]);
    }
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
      __syncwarp();
      // It also says that this lane has read the scales of the stage's last round. One lane could say so for its warp,
      // and be no faster, but race checkers do not follow that.
      Arrive(shared.empty[stage]);
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
  if (threadIdx.x % kWarpgroup == 0) WaitForStores();
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
      InitBarrier(shared.full[i], 1 + 2 * kLanes);  // LoadOperands, and the lanes that load scales
      InitBarrier(shared.empty[i], kPromotingWarps * kLanes);
    }
    for (int i = 0; i < 2; ++i) {
      InitBarrier(shared.listed[i], kLanes);
      InitBarrier(shared.unlisted[i], kPromotingWarps + 3);  // and the loading warps
    }
    FenceBarrierInit();
  }
  PlaceGroups(arguments, shared);
  OrderGroups(arguments, shared);

  if (warp < kWarpgroup / kLanes) {
    LeaveRegisters<kFeedRegisters>();
    if (warp == 0) LoadOperands(x, dy, shared);
    if (warp == 1) LoadRowScales(arguments, shared);
    if (warp == 2) LoadColumnScales(arguments, shared);
    if (warp == 3) ListTiles(arguments, shared);
  } else {
    TakeRegisters<kPromoteRegisters>();
    Promote<T>(dw, warp / (kWarpgroup / kLanes) - 1, shared);
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

// Null, or what went wrong. The error is taken from the runtime, which would show it to whoever asks next.
const char* Message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function that makes tensor maps, or null. It is found at run time: the module loads without a driver.
Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool usable = Message(error) == nullptr && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(function) : nullptr;
}

// Describes a dense row-major tensor to the copy engine, sizes from the innermost; returns whether that was possible.
template <size_t kRank>
bool MakeMap(Encode encode, CUtensorMap& map, CUtensorMapDataType type, int64_t element, const void* data,
             const cuuint64_t (&sizes)[kRank], const cuuint32_t (&box)[kRank]) {
  cuuint64_t strides[kRank - 1];
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  uint64_t stride = element;
  for (size_t i = 0; i + 1 < kRank; ++i) strides[i] = stride *= sizes[i];
  return encode(&map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T>
const char* Launch(const WgradProblem& problem, Encode encode, int64_t batch, int64_t multiprocessors, Stream stream) {
  constexpr auto kType =
      sizeof(T) == sizeof(float) ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto x_features = static_cast<uint64_t>(problem.x_features);
  const auto dy_features = static_cast<uint64_t>(problem.dy_features);
  const auto groups = static_cast<uint64_t>(problem.groups);
  const auto tokens = static_cast<uint64_t>(problem.tokens);
  CUtensorMap x, dy, dw;
  if (!MakeMap<2>(encode, x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.x + batch * x_features * tokens,
                  {tokens, x_features}, {kBlock, kTileRows}) ||
      !MakeMap<2>(encode, dy, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.dy + batch * dy_features * tokens,
                  {tokens, dy_features}, {kBlock, kTileColumns}) ||
      !MakeMap<3>(encode, dw, kType, sizeof(T), static_cast<T*>(problem.dw) + batch * groups * x_features * dy_features,
                  {dy_features, x_features, groups}, {kChunkRowBytes / sizeof(T), kRows, 1})) {
    return "the driver refused to make a tensor map";
  }
  const uint64_t blocks = tokens / kBlock;
  const Arguments arguments = {problem.x_scales + batch * blocks * x_features,
                               problem.dy_scales + batch * blocks * dy_features,
                               problem.group_sizes + batch * groups,
                               static_cast<uint32_t>(x_features),
                               static_cast<uint32_t>(dy_features),
                               static_cast<uint32_t>(groups),
                               static_cast<uint32_t>(blocks)};
  const int64_t tiles = groups * CeilDiv(x_features, kTileRows) * CeilDiv(dy_features, kTileColumns);
  if (tiles > INT32_MAX) return "dW has more than 2**31 tiles";
  const cudaError_t error =
      cudaFuncSetAttribute(WgradKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (const char* message = Message(error)) return message;
  WgradKernel<T><<<static_cast<unsigned>(std::min(tiles, multiprocessors)), kThreads, sizeof(Shared), stream>>>(
      x, dy, dw, arguments);
  return Message(cudaGetLastError());
}

}  // namespace

const char* WgradOnCuda(const WgradProblem& problem, Stream stream) {
  const int64_t results = problem.batch * problem.groups * problem.x_features * problem.dy_features;
  if (results == 0) return nullptr;
  if (problem.tokens == 0) {  // no tensor map has an empty side
    return Message(cudaMemsetAsync(problem.dw, 0, results * (problem.dw_is_bf16 ? 2 : 4), stream));
  }
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device), cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)}) {
    if (const char* message = Message(error)) return message;
  }
  if (major != 9 || minor != 0) return "this kernel runs on compute capability 9.0 only";
  static const Encode encode = FindEncode();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  for (int64_t batch = 0; batch < problem.batch; ++batch) {
    const auto launch = problem.dw_is_bf16 ? Launch<__nv_bfloat16> : Launch<float>;
    if (const char* message = launch(problem, encode, batch, multiprocessors, stream)) return message;
  }
  return nullptr;
}

}  // namespace jax_tsq
