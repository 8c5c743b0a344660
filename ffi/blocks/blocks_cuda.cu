// How the tiles of quantize_blocks map to weights.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "blocks/blocks.h"
#include "core/numerics.h"
#include "cuda/launch.cuh"
#include "cuda/tile/amax.cuh"
#include "cuda/tile/convert.cuh"
#include "cuda/tile/shape.cuh"
#include "cuda/tile/store_columns.cuh"
#include "cuda/tile/store_rows.cuh"

namespace jax_tsq::cuda {
namespace {

struct Position {
  int64_t expert;
  uint32_t row, column;  // of the joined array
};

struct Place {
  const char* address;
  uint64_t row_bytes;
};

// Where an element lies that exists.
template <int element_bytes>
__device__ __forceinline__ Place FindElement(const BlocksProblem& problem, const Position& position, uint32_t column) {
  int64_t part_column = column;
  int part = 0;
  while (part_column >= problem.parts[part].columns) part_column -= problem.parts[part++].columns;
  const char* weights = static_cast<const char*>(problem.parts[part].weights);
  const uint64_t row_bytes = problem.parts[part].columns * element_bytes;
  const int64_t row = position.expert * problem.rows + position.row;
  return {weights + row * row_bytes + part_column * element_bytes, row_bytes};
}

template <WeightType type>
__device__ __forceinline__ uint32_t PackPair(uint32_t low, uint32_t high) {
  if constexpr (type == WeightType::kFloat32) {
    const auto pair = __floats2bfloat162_rn(__uint_as_float(low), __uint_as_float(high));
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    return low | high << 16;
  }
}

// The quad at a position as bf16 pairs, zero where the array has ended. `aligned`: every octet lies within one part, as
// aligned vectors of 16 bytes.
template <WeightType type, bool aligned>
__device__ __forceinline__ void LoadWeights(const BlocksProblem& problem, const Position& position,
                                            uint32_t (&pairs)[kQuad][kPairs]) {
  constexpr bool kFloat32 = type == WeightType::kFloat32;
  constexpr int kElementBytes = kFloat32 ? 4 : 2;
  const auto rows = static_cast<int>(problem.rows - position.row);
  const auto columns = static_cast<int>(problem.columns - position.column);
  if constexpr (aligned) {
    constexpr int kVectors = kOctet * kElementBytes / sizeof(uint4);
    uint4 vectors[kQuad][kVectors] = {};
    if (columns > 0) {
      const Place place = FindElement<kElementBytes>(problem, position, position.column);
#pragma unroll
      for (int r = 0; r < kQuad; ++r) {
        const auto* address = reinterpret_cast<const uint4*>(place.address + r * place.row_bytes);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (r < rows) vectors[r][i] = __ldg(address + i);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      const auto& words = reinterpret_cast<const uint32_t (&)[kVectors * 4]>(vectors[r]);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if constexpr (kFloat32) {
          pairs[r][i] = PackPair<type>(words[2 * i], words[2 * i + 1]);
        } else {
          pairs[r][i] = words[i];
        }
      }
    }
  } else {
    using Element = std::conditional_t<kFloat32, uint32_t, uint16_t>;
    uint32_t elements[kQuad][kOctet] = {};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i >= columns) continue;
      const Place place = FindElement<kElementBytes>(problem, position, position.column + i);
#pragma unroll
      for (int r = 0; r < kQuad; ++r) {
        if (r < rows) elements[r][i] = __ldg(reinterpret_cast<const Element*>(place.address + r * place.row_bytes));
      }
    }
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) pairs[r][i] = PackPair<type>(elements[r][2 * i], elements[r][2 * i + 1]);
    }
  }
}

// Loads of float32, and of single elements, need the registers of a third thread block.
template <WeightType type, bool rows_aligned>
constexpr int kCtasPerSm = type == WeightType::kBf16 && rows_aligned ? 3 : 2;

template <WeightType type, bool rows_aligned, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(kCtasPerSm<type, rows_aligned>, rows_aligned))
    BlocksKernel(const __grid_constant__ BlocksProblem problem, const __grid_constant__ Divisor column_tiles,
                 const __grid_constant__ Divisor row_tiles) {
  static_assert(Shape::kTokens == kBlock && Shape::kColumns == kBlock);
  __shared__ TileWords<Shape> storage;
  __shared__ uint32_t warp_amax[Shape::kWarps];

  // Consecutive blocks walk the columns first: whole rows are read.
  const uint32_t expert_row = column_tiles.Divide(blockIdx.x);
  const uint32_t column_tile = blockIdx.x - expert_row * column_tiles.value;
  const uint32_t expert = row_tiles.Divide(expert_row);
  const uint32_t row_tile = expert_row - expert * row_tiles.value;
  const uint32_t first_row = row_tile * kBlock;
  const uint32_t first_column = column_tile * kBlock;

  const uint32_t row = threadIdx.x / Shape::kOctets * kQuad;
  const uint32_t column = threadIdx.x % Shape::kOctets * kOctet;
  uint32_t pairs[kQuad][kPairs];
  LoadWeights<type, rows_aligned>(problem, {expert, first_row + row, first_column + column}, pairs);

  uint32_t amax = 0;
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) amax = MaxMagnitudes(amax, pairs[r][i]);
  }
  const float quant_scale = QuantScale(TileAmax(amax, warp_amax), problem.pow_2_scales);
  if (threadIdx.x == 0)
    problem.dequant_scales[(uint64_t{expert} * row_tiles.value + row_tile) * column_tiles.value + column_tile] =
        1.0f / quant_scale;

  // Each element is converted once: a feature's word goes to shared memory, the quad's rows are its bytes.
  uint2 octets[kQuad];
  const uint32_t position = SwizzledWord(column, row / kQuad);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[kQuad];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = 2 * half + i;
      words[2 * i] = ConvertQuad(LowHalf(pairs[0][pair]), LowHalf(pairs[1][pair]), LowHalf(pairs[2][pair]),
                                 LowHalf(pairs[3][pair]), quant_scale);
      words[2 * i + 1] = ConvertQuad(HighHalf(pairs[0][pair]), HighHalf(pairs[1][pair]), HighHalf(pairs[2][pair]),
                                     HighHalf(pairs[3][pair]), quant_scale);
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) storage.words[0][column + half * kQuad + i][position] = words[i];
    TransposeBytes(words);
#pragma unroll
    for (int r = 0; r < kQuad; ++r) (half == 0 ? octets[r].x : octets[r].y) = words[r];
  }

  const auto rows = static_cast<uint32_t>(problem.rows);
  const auto columns = static_cast<uint32_t>(problem.columns);
  const int tile_rows = static_cast<int>(min(rows - first_row, kBlock));
  const uint64_t expert_offset = expert * (problem.rows * problem.columns);
  const RowDestination row_destination = {problem.values + expert_offset + uint64_t{first_row} * columns + first_column,
                                          columns, nullptr, tile_rows,
                                          static_cast<int>(min(columns - first_column, kBlock))};
  StoreRows<rows_aligned>(octets, row, row_destination);
  __syncthreads();
  StoreColumns<Shape>(columns, first_column, {problem.transposed + expert_offset + first_row, rows, tile_rows, nullptr},
                      storage);
}

template <WeightType type, bool rows_aligned, class Shape>
const char* Launch(const BlocksProblem& problem, Stream stream) {
  const int64_t column_tiles = CeilDiv(problem.columns, kBlock);
  const int64_t row_tiles = CeilDiv(problem.rows, kBlock);
  if (row_tiles * column_tiles > kMaxThreadBlocks / problem.experts) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  BlocksKernel<type, rows_aligned, Shape>
      <<<static_cast<unsigned>(problem.experts * row_tiles * column_tiles), Shape::kThreads, 0, stream>>>(
          problem, Divisor(column_tiles), Divisor(row_tiles));
  return LaunchError();
}

template <WeightType type>
const char* LaunchAny(const BlocksProblem& problem, Stream stream) {
  bool rows_aligned = IsAligned(problem.values, kOctet);
  for (int i = 0; i < problem.num_parts; ++i) {
    const WeightPart& part = problem.parts[i];
    rows_aligned = rows_aligned && part.columns % kOctet == 0 && IsAligned(part.weights, sizeof(uint4));
  }
  const bool columns_aligned = problem.rows % kVectorBytes == 0 && IsAligned(problem.transposed, kVectorBytes);
  using Aligned = TileShape<kVectorBytes, 1, kBlock>;
  using Unaligned = TileShape<1, 1, kBlock>;
  if (rows_aligned) {
    return columns_aligned ? Launch<type, true, Aligned>(problem, stream)
                           : Launch<type, true, Unaligned>(problem, stream);
  }
  return columns_aligned ? Launch<type, false, Aligned>(problem, stream)
                         : Launch<type, false, Unaligned>(problem, stream);
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* BlocksOnCuda(const BlocksProblem& problem, Stream stream) {
  if (problem.experts == 0 || problem.rows == 0 || problem.columns == 0) return nullptr;
  if (std::max(problem.rows, problem.columns) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 rows or columns";
  }
  return problem.type == WeightType::kFloat32 ? cuda::LaunchAny<WeightType::kFloat32>(problem, stream)
                                              : cuda::LaunchAny<WeightType::kBf16>(problem, stream);
}

}  // namespace jax_tsq
