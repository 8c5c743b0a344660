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
// A tile of dW is stored; or the copy engine adds it to an accumulator, which takes one float32 addition for each
// element since no two tiles have one in common.
//
// What limits it on an H100 is power, which lowers the clock; then the path to shared memory, busy for 70 to 84 % of
// the time with what the tensor cores read, with copies, and with scales, which every warp loads for itself; and in
// float32 the store, during which a warpgroup has no registers for the next tile.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/errors.h"
#include "sm90/device.h"
#include "sm90/tensor_map.h"
#include "wgrad/wgrad.h"
#include "wgrad/wgrad_tiles.cuh"

namespace jax_tsq::sm90::wgrad {
namespace {

// --- Loads -----------------------------------------------------------------------------------------------------------

// One thread loads the operands.
__device__ void LoadOperands(const CUtensorMap& x, const CUtensorMap& dy, Shared& shared) {
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    const uint32_t first_block = shared.first_block[tile.group];
    ForEachBlock<kStages>(tile.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      Barrier& full = shared.pipeline.full[stage];
      Wait(shared.pipeline.empty[stage], parity ^ 1);
      if (threadIdx.x % kWarp == 0) {
        const uint32_t token_block = first_block + block;
        ArriveAndExpect(full, sizeof(shared.x[stage]) + sizeof(shared.dy[stage]));
        LoadBox(shared.x[stage], x, token_block * kBlock, tile.row, full);
        LoadBox(shared.dy[stage], dy, token_block * kBlock, tile.column, full);
      }
      // A lane that fell behind by two phases would wait forever.
      __syncwarp();
    });
  }
}

// One warp loads the scales of x, four or eight for each lane. It is ahead of the warpgroups by as many blocks as there
// are stages, so that nobody waits for its loads.
__device__ void LoadRowScales(const Arguments& arguments, Shared& shared) {
  constexpr int kAtOnce = kWarp * 4;
  const int row = threadIdx.x % kWarp * 4;
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    const float* scales =
        arguments.x_scales + int64_t{shared.first_block[tile.group]} * arguments.x_features + tile.row + row;
    const bool exists = tile.row + row < arguments.x_features;
    const bool more = row + kAtOnce < kTileRows && tile.row + row + kAtOnce < arguments.x_features;
    ForEachBlock<kStages>(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      const float4 first = exists ? *reinterpret_cast<const float4*>(scales) : float4{};
      const float4 second = more ? *reinterpret_cast<const float4*>(scales + kAtOnce) : float4{};
      scales += arguments.x_features;
      Wait(shared.pipeline.empty[stage], parity ^ 1);
      float* const to = shared.x_scales[parity][stage] + row;
      *reinterpret_cast<float4*>(to) = first;
      if (row + kAtOnce < kTileRows) *reinterpret_cast<float4*>(to + kAtOnce) = second;
      Arrive(shared.pipeline.full[stage]);
    });
  }
}

// Another one loads the scales of dy. A thread's product is in columns 8 j + 2 q and the next, for its q and j = 0
// ... 15. Four of its scales are put side by side, those for an even j and for the next: it reads them at once.
__device__ void LoadColumnScales(const Arguments& arguments, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  const int column = lane * 4;
  const int position = column / 16 * 16 + column / 2 % 4 * 4 + column / 8 % 2 * 2;
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    const bool exists = tile.column + column < arguments.dy_features;
    const float* scales = arguments.dy_scales + int64_t{shared.first_block[tile.group]} * arguments.dy_features +
                          (exists ? tile.column + column : 0);
    ForEachBlock<kStages>(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      const float4 scale = exists ? *reinterpret_cast<const float4*>(scales) : float4{};
      scales += arguments.dy_features;
      Wait(shared.pipeline.empty[stage], parity ^ 1);
      float* const to = shared.dy_scales[parity][stage] + position;
      *reinterpret_cast<float2*>(to) = make_float2(scale.x, scale.y);
      *reinterpret_cast<float2*>(to + 4) = make_float2(scale.z, scale.w);  // of the next q
      Arrive(shared.pipeline.full[stage]);
    });
  }
}

// --- Promotion -------------------------------------------------------------------------------------------------------

template <class T, bool kAccumulate>
__device__ void Promote(const CUtensorMap& dw, int warpgroup, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp * 16 % kProductRows + lane / 4 + warpgroup * kProductRows;
  const int q = lane % 4;
  const uint32_t x = __shfl_sync(kAllLanes, Descriptor(shared.x[0] + warpgroup * kProductRows * kBlock), 0);
  const uint32_t dy = Descriptor(shared.dy[0]);
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    if (kAccumulate && tile.blocks == 0) continue;
    Product sums;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    ForEachBlock<kStages>(tile.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
      Product product;
      Wait(shared.pipeline.full[stage], parity);
      StartProduct(product, x + stage * (sizeof(shared.x[0]) >> 4), dy + stage * (sizeof(shared.dy[0]) >> 4));
      const float upper = shared.x_scales[parity][stage][row];
      const float lower = shared.x_scales[parity][stage][row + 8];
      const float4* const columns = reinterpret_cast<const float4*>(shared.dy_scales[parity][stage]) + q;
      FinishProduct(product);
      __syncwarp();
      // It also says that this lane has read the scales of the stage's last round. One lane could say so for its warp,
      // and be no faster, but race checkers do not follow that.
      Arrive(shared.pipeline.empty[stage]);
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
    StoreSums<T>(sums, warpgroup, shared.chunks[warpgroup], [&](int column, const Chunk& chunk) {
      const int32_t first_row = tile.row + warpgroup * kProductRows;
      if constexpr (kAccumulate) {
        AddBox(dw, tile.column + column, first_row, tile.group, chunk);
      } else {
        StoreBox(dw, tile.column + column, first_row, tile.group, chunk);
      }
    });
  }
  if (threadIdx.x % kWarpgroup == 0) WaitForStores();
}

// --- The kernel ------------------------------------------------------------------------------------------------------

template <class T, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, 1)
    WgradKernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dy,
                const __grid_constant__ CUtensorMap dw, const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  // Uniform, as the compiler has to know before it gives registers away.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);

  if (threadIdx.x == 0) {
    constexpr int kPromotingWarps = kPromoters * kWarpgroup / kWarp;
    InitPipeline(shared.pipeline, 1 + 2 * kWarp, kPromotingWarps * kWarp);  // LoadOperands, and lanes that load scales
    InitPipeline(shared.batches, kWarp, (kPromotingWarps + 3) * kWarp);     // lanes of promoting and loading warps
    FenceBarrierInit();
  }
  PlaceGroups(arguments, shared);
  OrderGroups(arguments, shared);

  if (warp < kWarpgroup / kWarp) {
    LeaveRegisters<kFeedRegisters>();
    if (warp == 0) LoadOperands(x, dy, shared);
    if (warp == 1) LoadRowScales(arguments, shared);
    if (warp == 2) LoadColumnScales(arguments, shared);
    if (warp == 3) ListTiles(shared.batches, shared.tiles, TileOrder(arguments, shared));
  } else {
    TakeRegisters<kPromoteRegisters>();
    Promote<T, kAccumulate>(dw, warp / (kWarpgroup / kWarp) - 1, shared);
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

template <class T, bool kAccumulate>
const char* Launch(const WgradProblem& problem, const Device& device, int64_t batch, Stream stream) {
  constexpr auto kType =
      sizeof(T) == sizeof(float) ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto x_features = static_cast<uint64_t>(problem.x_features);
  const auto dy_features = static_cast<uint64_t>(problem.dy_features);
  const auto groups = static_cast<uint64_t>(problem.groups);
  const auto tokens = static_cast<uint64_t>(problem.tokens);
  CUtensorMap x, dy, dw;
  if (!MakeMap<2>(device.encode, x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.x + batch * x_features * tokens,
                  {tokens, x_features}, {kBlock, kTileRows}) ||
      !MakeMap<2>(device.encode, dy, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.dy + batch * dy_features * tokens,
                  {tokens, dy_features}, {kBlock, kTileColumns}) ||
      !MakeMap<3>(device.encode, dw, kType, sizeof(T),
                  static_cast<T*>(problem.dw) + batch * groups * x_features * dy_features,
                  {dy_features, x_features, groups}, {kChunkRowBytes / sizeof(T), kProductRows, 1})) {
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
  constexpr auto kKernel = WgradKernel<T, kAccumulate>;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (const char* message = cuda::Message(error)) return message;
  const int64_t thread_blocks = std::min(tiles, Multiprocessors(device, problem.multiprocessors));
  kKernel<<<static_cast<unsigned>(thread_blocks), kThreads, sizeof(Shared), stream>>>(x, dy, dw, arguments);
  return cuda::LaunchError();
}

}  // namespace
}  // namespace jax_tsq::sm90::wgrad

namespace jax_tsq {

const char* WgradOnCuda(const WgradProblem& problem, Stream stream) {
  const int64_t results = problem.batch * problem.groups * problem.x_features * problem.dy_features;
  const bool accumulate = problem.accumulator != nullptr;
  if (results == 0) return nullptr;
  if (accumulate && problem.accumulator != problem.dw) {
    const cudaError_t error =
        cudaMemcpyAsync(problem.dw, problem.accumulator, results * 4, cudaMemcpyDeviceToDevice, stream);
    if (const char* message = cuda::Message(error)) return message;
  }
  if (problem.tokens == 0) {  // no tensor map has an empty side
    if (accumulate) return nullptr;
    return cuda::Message(cudaMemsetAsync(problem.dw, 0, results * (problem.dw_is_bf16 ? 2 : 4), stream));
  }
  sm90::Device device;
  if (const char* message = sm90::FindDevice(device)) return message;
  for (int64_t batch = 0; batch < problem.batch; ++batch) {
    const auto launch = problem.dw_is_bf16 ? sm90::wgrad::Launch<__nv_bfloat16, false>
                        : accumulate       ? sm90::wgrad::Launch<float, true>
                                           : sm90::wgrad::Launch<float, false>;
    if (const char* message = launch(problem, device, batch, stream)) return message;
  }
  return nullptr;
}

}  // namespace jax_tsq
