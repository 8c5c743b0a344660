// ragged_matmul on the tensor cores of compute capability 9.0.
//
// A thread block stays on its multiprocessor and takes one tile of y after the other: up to 192 rows of one group by
// 128 columns. For every block of 128 features
//
//     product[t][n] = sum over the block's features of x[t][k] * w[e][n][k]      tensor cores
//     y[t][n] += product[t][n] * (x_scale[t] * w_scale)                          promotion, in float32
//
// Three warpgroups multiply and promote, each a piece of 64 rows: while one promotes, the tensor cores work for the
// others. Everything else is kept away from them: one warp loads operands ahead of them, one loads scales, one decides
// which tile is next, and one writes zeros past the last group.
//
// Two thread blocks make a cluster: their tiles have the same rows, and each loads half of x for both.
//
// A group starts at any row of x. Its last piece may reach into the next group, whose rows are multiplied in vain and
// not stored.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/errors.h"
#include "matmul/matmul.h"
#include "matmul/matmul_tiles.cuh"
#include "sm90/cluster.cuh"
#include "sm90/copy.cuh"
#include "sm90/device.h"
#include "sm90/tensor_map.h"

namespace jax_tsq::sm90::matmul {
namespace {

// --- Loads -----------------------------------------------------------------------------------------------------------

// One thread loads the operands. Thread blocks of a cluster multiply the same rows: each loads its share of every piece
// of x for all of them.
__device__ void LoadOperands(const CUtensorMap& x, const CUtensorMap& w, const Arguments& arguments, Shared& shared) {
  constexpr int kShare = kProductRows / kCluster;
  const int share = blockIdx.x % kCluster * kShare;
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    // Other lanes do not even wait: one that wakes up two phases later would wait forever.
    if (threadIdx.x % kWarp != 0) continue;
    const uint32_t pieces = CeilDiv(tile.rows, kProductRows);
    const uint32_t bytes = sizeof(shared.w[0]) + pieces * kPieceBytes;
    ForEachBlock<kStages>(arguments.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      Barrier& full = shared.pipeline.full[stage];
      Wait(shared.pipeline.empty[stage], parity ^ 1);
      ArriveAndExpect(full, bytes);
      LoadBox(shared.w[stage], w, block * kBlock, tile.column, tile.group, full);
#pragma unroll
      for (uint32_t piece = 0; piece < kPromoters; ++piece) {
        if (piece == pieces) break;
        uint8_t* const to = shared.x[stage][piece] + share * kBlock;
        const uint32_t row = tile.row + piece * kProductRows + share;
        LoadBoxForAll(to, x, block * kBlock, row, full, (1 << kCluster) - 1);
      }
    });
  }
}

// One warp loads the scales, those of x for rows 32 apart in each lane: a group's start need not be aligned.
__device__ void LoadScales(const Arguments& arguments, Shared& shared) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t position = lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2;
  const uint32_t column_blocks = CeilDiv(arguments.columns, kBlock);
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    const float* const x_scales = arguments.x_scales + tile.row + lane;
    const float* const w_scales = arguments.w_scales + uint64_t{tile.group} * arguments.blocks * column_blocks +
                                  tile.column / kBlock * arguments.scale_column_step;
    // The last thread block of a cluster may have columns that do not exist.
    const bool loads_w_scale = lane == 0 && tile.column < arguments.columns;
    ForEachBlock<kStages>(arguments.blocks, parities, [&](uint32_t block, int stage, uint32_t parity) {
      const float* const from = x_scales + uint64_t{block} * arguments.tokens;
      float* const to = &shared.x_scales[stage][0].x + position;
      Wait(shared.pipeline.empty[stage], parity ^ 1);
#pragma unroll
      for (uint32_t row = 0; row < kTileRows; row += kWarp) {
        if (row + lane < tile.rows) CopyFloat(to + row, from + row);
      }
      if (loads_w_scale) CopyFloat(&shared.w_scale[stage], w_scales + uint64_t{block} * arguments.scale_block_step);
      ArriveAfterCopies(shared.pipeline.full[stage]);
    });
  }
}

// --- Promotion -------------------------------------------------------------------------------------------------------

// Says that this lane does not need a stage any more, to both thread blocks: either loads into it.
__device__ __forceinline__ void Release(Barrier& empty) {
  // One lane could say so for its warp, and be no faster, but race checkers do not follow that.
  Arrive(empty);
  static_assert(kCluster == 2);
  __syncwarp();
  if (threadIdx.x % kWarp == 0) ArriveAt(empty, blockIdx.x % 2 ^ 1);
}

// Stores the first `rows` rows of a piece. The copy engine would store all 64, of which the others are not the group's.
__device__ __forceinline__ void StoreRows(const Arguments& arguments, uint32_t first_row, uint32_t rows,
                                          uint32_t first_column, const Product& sums, int warpgroup,
                                          Chunk (&chunks)[2]) {
  constexpr int kVectorColumns = sizeof(uint4) / sizeof(__nv_bfloat16);
  constexpr uint32_t kVectors = kTileColumns / kVectorColumns, kChunkVectors = kVectors / 2;  // of a row
  const uint32_t thread = threadIdx.x % kWarpgroup;
  if (thread == 0) WaitForStores();  // the chunks' former content is on its way
  SyncWarpgroup(warpgroup);
  WriteChunks<__nv_bfloat16>(sums, thread, 0, chunks);
  SyncWarpgroup(warpgroup);
  for (uint32_t i = thread; i < rows * kVectors; i += kWarpgroup) {
    const uint32_t row = i / kVectors, vector = i % kVectors;
    if (first_column + vector * kVectorColumns >= arguments.columns) continue;
    const uint8_t* const from =
        chunks[vector / kChunkVectors] + row * kChunkRowBytes + (vector % kChunkVectors ^ row % 8) * sizeof(uint4);
    const uint64_t to = uint64_t{first_row + row} * arguments.columns + first_column;
    arguments.y[to / kVectorColumns + vector] = *reinterpret_cast<const uint4*>(from);
  }
}

__device__ void Promote(const CUtensorMap& y, const Arguments& arguments, int warpgroup, Shared& shared) {
  const int pair = warpgroup * kProductRows / 2 + threadIdx.x % kWarpgroup / kWarp * 8 + threadIdx.x % kWarp / 4;
  const uint32_t x = __shfl_sync(kAllLanes, Descriptor(shared.x[0][warpgroup]), 0);
  const uint32_t w = __shfl_sync(kAllLanes, Descriptor(shared.w[0]), 0);
  TileReader tiles(shared.batches, shared.tiles);
  uint32_t parities = 0;
  for (Tile tile; !(tile = tiles.Next()).IsEnd();) {
    const uint32_t piece = warpgroup * kProductRows;
    if (piece >= tile.rows) {  // nothing to do but to keep up with the stages
      ForEachBlock<kStages>(arguments.blocks, parities, [&](uint32_t, int stage, uint32_t parity) {
        Wait(shared.pipeline.full[stage], parity);
        Release(shared.pipeline.empty[stage]);
      });
      continue;
    }
    Product sums;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    ForEachBlock<kStages>(arguments.blocks, parities, [&](uint32_t, auto stage, uint32_t parity) {
      constexpr uint32_t kX = stage * (sizeof(shared.x[0]) >> 4), kW = stage * (sizeof(shared.w[0]) >> 4);
      Product product;
      Wait(shared.pipeline.full[stage], parity);
      StartProduct<kX, kW>(product, x, w);
      __syncwarp();  // or the compiler lets products wait for scales
      const float2 x_scales = shared.x_scales[stage][pair];
      const float w_scale = shared.w_scale[stage];
      const float upper = x_scales.x * w_scale, lower = x_scales.y * w_scale;
      FinishProduct(product);
      Release(shared.pipeline.empty[stage]);
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        sums[i] = fmaf(product[i], upper, sums[i]);
        sums[i + 1] = fmaf(product[i + 1], upper, sums[i + 1]);
        sums[i + 2] = fmaf(product[i + 2], lower, sums[i + 2]);
        sums[i + 3] = fmaf(product[i + 3], lower, sums[i + 3]);
      }
    });
    const uint32_t row = tile.row + piece, rows = tile.rows - piece;
    if (rows >= kProductRows) {
      StoreSums<__nv_bfloat16>(sums, warpgroup, shared.chunks[warpgroup],
                               [&](int column, const Chunk& chunk) { StoreBox(y, tile.column + column, row, chunk); });
    } else {
      StoreRows(arguments, row, rows, tile.column, sums, warpgroup, shared.chunks[warpgroup]);
    }
  }
  if (threadIdx.x % kWarpgroup == 0) WaitForStores();
}

// --- Zeros -----------------------------------------------------------------------------------------------------------

// One warp of each thread block writes a share of what follows the last group.
__device__ void WriteZeros(const Arguments& arguments, const Shared& shared) {
  const uint64_t row_vectors = arguments.columns * sizeof(__nv_bfloat16) / sizeof(uint4);
  const uint64_t end = arguments.tokens * row_vectors;
  uint64_t i = shared.first_row[arguments.groups] * row_vectors + blockIdx.x * kWarp + threadIdx.x % kWarp;
  for (; i < end; i += gridDim.x * kWarp) arguments.y[i] = uint4{};
}

// --- The kernel ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1)
    MatmulKernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                 const __grid_constant__ CUtensorMap y, const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  // Uniform, as the compiler has to know before it gives registers away.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);

  if (threadIdx.x == 0) {
    constexpr int kPromotingWarps = kPromoters * kWarpgroup / kWarp;
    // Producers are LoadOperands and the lanes of LoadScales; consumers all promoting lanes here, and those of other
    // thread blocks, where one speaks for its warp.
    InitPipeline(shared.pipeline, 1 + kWarp, kPromotingWarps * (kWarp + kCluster - 1));
    InitPipeline(shared.batches, kWarp, (kPromotingWarps + 2) * kWarp);  // lanes of promoting and loading warps
    FenceBarrierInit();
  }
  PlaceGroups(arguments, shared);
  SyncCluster();  // before others use the barriers

  if (warp < kWarpgroup / kWarp) {
    LeaveRegisters<kFeedRegisters>();
    if (warp == 0) LoadOperands(x, w, arguments, shared);
    if (warp == 1) LoadScales(arguments, shared);
    if (warp == 2) WriteZeros(arguments, shared);
    if (warp == 3) ListTiles(shared.batches, shared.tiles, TileOrder(arguments, shared));
  } else {
    TakeRegisters<kPromoteRegisters>();
    Promote(y, arguments, warp / (kWarpgroup / kWarp) - 1, shared);
  }
  SyncCluster();  // after others have used them
}

// --- Launch ----------------------------------------------------------------------------------------------------------

const char* Launch(const MatmulProblem& problem, const Device& device, int64_t batch, Stream stream) {
  constexpr uint64_t kResultBytes = sizeof(__nv_bfloat16);
  const auto groups = static_cast<uint64_t>(problem.groups);
  const auto tokens = static_cast<uint64_t>(problem.tokens);
  const auto features = static_cast<uint64_t>(problem.features);
  const auto columns = static_cast<uint64_t>(problem.columns);
  const uint64_t blocks = CeilDiv(features, kBlock), column_blocks = CeilDiv(columns, kBlock);
  uint8_t* const results = static_cast<uint8_t*>(problem.y) + batch * tokens * columns * kResultBytes;
  CUtensorMap x, w, y;
  if (!MakeMap<2>(device.encode, x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.x + batch * tokens * features,
                  {features, tokens}, {kBlock, kProductRows / kCluster}) ||
      !MakeMap<3>(device.encode, w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.w + batch * groups * columns * features,
                  {features, columns, groups}, {kBlock, kTileColumns, 1}) ||
      !MakeMap<2>(device.encode, y, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kResultBytes, results, {columns, tokens},
                  {kChunkRowBytes / kResultBytes, kProductRows})) {
    return "the driver refused to make a tensor map";
  }
  const bool by_column = problem.w_scales_by_column;
  const Arguments arguments = {problem.x_scales + batch * blocks * tokens,
                               problem.w_scales + batch * groups * blocks * column_blocks,
                               problem.group_sizes + batch * groups,
                               reinterpret_cast<uint4*>(results),
                               static_cast<uint32_t>(tokens),
                               static_cast<uint32_t>(columns),
                               static_cast<uint32_t>(groups),
                               static_cast<uint32_t>(blocks),
                               static_cast<uint32_t>(by_column ? 1 : column_blocks),
                               static_cast<uint32_t>(by_column ? blocks : 1)};
  // Every group that is not empty may have one tile that is not full.
  const int64_t row_tiles = tokens / kTileRows + std::min(groups, tokens);
  const int64_t tiles = row_tiles * CeilDiv(columns, kCluster * kTileColumns);
  if (tiles > INT32_MAX / kCluster) return "y has more than 2**30 tiles";
  const int64_t most = Multiprocessors(device, problem.multiprocessors);
  const int64_t clusters = std::min(tiles, std::max<int64_t>(most / kCluster, 1));

  cudaError_t error = cudaFuncSetAttribute(MatmulKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (const char* message = cuda::Message(error)) return message;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = static_cast<unsigned>(clusters * kCluster);
  launch.blockDim = kThreads;
  launch.dynamicSmemBytes = sizeof(Shared);
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  error = cudaLaunchKernelEx(&launch, MatmulKernel, x, w, y, arguments);
  return cuda::Message(error);
}

}  // namespace
}  // namespace jax_tsq::sm90::matmul

namespace jax_tsq {

const char* MatmulOnCuda(const MatmulProblem& problem, Stream stream) {
  const int64_t results = problem.batch * problem.tokens * problem.columns;
  if (results == 0) return nullptr;
  if (problem.groups == 0 || problem.features == 0) {  // no tensor map has an empty side
    return cuda::Message(cudaMemsetAsync(problem.y, 0, results * sizeof(__nv_bfloat16), stream));
  }
  sm90::Device device;
  if (const char* message = sm90::FindDevice(device)) return message;
  for (int64_t batch = 0; batch < problem.batch; ++batch) {
    if (const char* message = sm90::matmul::Launch(problem, device, batch, stream)) return message;
  }
  return nullptr;
}

}  // namespace jax_tsq
