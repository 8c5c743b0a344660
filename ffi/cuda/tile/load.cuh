// Where a tile's quads come from: rows of x at any alignment, as pairs of bf16.

#ifndef JAX_TSQ_CUDA_TILE_LOAD_CUH_
#define JAX_TSQ_CUDA_TILE_LOAD_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "core/input.h"
#include "cuda/launch.cuh"
#include "cuda/tile/shape.cuh"

namespace jax_tsq::cuda {

// How rows of x are read.
template <InputType type, bool aligned>
struct RowAccess {
  static constexpr InputType kType = type;
  static constexpr bool kAligned = aligned;  // every octet is one aligned vector
  using Octet = std::conditional_t<type == InputType::kBf16, uint4, uint2>;
  using Piece = std::conditional_t<type == InputType::kBf16, uint2, uint32_t>;  // what unaligned rows are loaded by
  static constexpr int kElementBytes = sizeof(Octet) / kOctet;
  static constexpr int kWords = sizeof(Octet) / 4;
  static constexpr int kSpareWords = sizeof(Piece) / 4;
};

inline bool RowsAligned(const Input& input) {
  const int octet_bytes = input.type == InputType::kBf16 ? sizeof(uint4) : sizeof(uint2);
  return IsAligned(input.x, octet_bytes) && input.features % kOctet == 0;
}

// Loads one octet of each of `kRows` consecutive rows, those of the first `rows` that exist;
// words[row][0 .. Access::kWords) hold it.
template <class Access, int kRows>
__device__ __forceinline__ void LoadWords(const Input& input, const TileSource& source, uint32_t row, uint32_t column,
                                          int rows, uint32_t (&words)[kRows][Access::kWords + Access::kSpareWords]) {
  const char* x = static_cast<const char*>(input.x);
  const uint64_t row_bytes = static_cast<uint32_t>(input.features) * Access::kElementBytes;
  const char* tile = x + source.first_row * row_bytes + source.first_column * Access::kElementBytes;
  const char* address = Anchor(tile + row * row_bytes + column * Access::kElementBytes);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Access::kWords + Access::kSpareWords; ++i) words[r][i] = 0;
  }

  if constexpr (Access::kAligned) {
    using Octet = typename Access::Octet;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) reinterpret_cast<Octet&>(words[r]) = __ldg(reinterpret_cast<const Octet*>(address + r * row_bytes));
    }
    return;
  }

  // Aligned pieces around each octet. Near the ends of what may be read, single elements instead.
  using Piece = typename Access::Piece;
  constexpr int kPieces = (Access::kWords + Access::kSpareWords) / Access::kSpareWords;
  constexpr uintptr_t kMask = sizeof(Piece) - 1;
  const auto start = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(x + source.begin_row * row_bytes);
  const auto end = reinterpret_cast<uintptr_t>(x + source.end_row * row_bytes);
  if ((start & ~kMask) >= begin && start + (kRows - 1) * row_bytes + kPieces * sizeof(Piece) <= end) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* aligned = reinterpret_cast<const Piece*>((start + r * row_bytes) & ~kMask);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (r < rows) reinterpret_cast<Piece&>(words[r][i * Access::kSpareWords]) = __ldg(aligned + i);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ShiftDown<Access::kWords, Access::kSpareWords>(words[r], static_cast<uint32_t>(start + r * row_bytes) & kMask);
    }
    return;
  }
  using Element = std::conditional_t<Access::kElementBytes == 2, uint16_t, uint8_t>;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (r >= rows || source.first_column + column + i >= input.features) continue;
      const uint32_t element = __ldg(reinterpret_cast<const Element*>(address + r * row_bytes) + i);
      words[r][i * Access::kElementBytes / 4] |= element << (i * Access::kElementBytes % 4 * 8);
    }
  }
}

// `kRows` consecutive rows of an octet as bf16 pairs; zero where x has none.
template <class Access, int kRows>
__device__ __forceinline__ void LoadPairs(const Input& input, const TileSource& source, uint32_t row, uint32_t column,
                                          uint32_t (&pairs)[kRows][kPairs]) {
  const int rows = source.first_column + column < input.features ? source.rows - static_cast<int>(row) : 0;
  uint32_t words[kRows][Access::kWords + Access::kSpareWords];
  if constexpr (Access::kType == InputType::kBf16) {
    LoadWords<Access>(input, source, row, column, rows, words);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) pairs[r][i] = words[r][i];
    }
  } else {
    // A tile is no wider than a block of features: one scale for a row.
    const uint64_t pitch = (static_cast<uint32_t>(input.features) + kBlock - 1) / kBlock;
    const float* input_scales = input.input_scales + source.first_row * pitch + source.first_column / kBlock;
    input_scales = Anchor(input_scales + row * pitch);
    float input_scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) input_scale[r] = r < rows ? __ldg(input_scales + r * pitch) : 0.0f;
    LoadWords<Access>(input, source, row, column, rows, words);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const auto fp8 = static_cast<__nv_fp8x2_storage_t>(words[r][i / 2] >> (i % 2 * 16));
        const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(fp8, __NV_E4M3)));
        const auto pair = __floats2bfloat162_rn(value.x * input_scale[r], value.y * input_scale[r]);
        pairs[r][i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
  }
}

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_TILE_LOAD_CUH_
