// The first phase of a tile: rows of x at any alignment, as pairs of bf16.

#ifndef JAX_TSQ_CUDA_TILE_LOAD_CUH_
#define JAX_TSQ_CUDA_TILE_LOAD_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "cuda/tile/shape.cuh"

namespace jax_tsq {

// The same pointer, from which the compiler takes offsets instead of multiplying anew for each of them.
template <class T>
__device__ __forceinline__ T* Anchor(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Loads one octet of each of the quad's rows that exist; words[row][0 .. Shape::kWords) hold it.
template <class Shape>
__device__ __forceinline__ void LoadQuad(const Input& input, const TileSource& source, uint32_t row, uint32_t column,
                                         int rows, uint32_t (&words)[kQuad][Shape::kWords + Shape::kSpareWords]) {
  const char* x = static_cast<const char*>(input.x);
  const uint64_t row_bytes = static_cast<uint32_t>(input.features) * Shape::kElementBytes;
  const char* tile = x + source.first_row * row_bytes + source.first_column * Shape::kElementBytes;
  const char* address = Anchor(tile + row * row_bytes + column * Shape::kElementBytes);
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
#pragma unroll
    for (int i = 0; i < Shape::kWords + Shape::kSpareWords; ++i) words[r][i] = 0;
  }

  if constexpr (Shape::kRowsAligned) {
    using Octet = typename Shape::Octet;
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      if (r < rows) reinterpret_cast<Octet&>(words[r]) = __ldg(reinterpret_cast<const Octet*>(address + r * row_bytes));
    }
    return;
  }

  // Aligned pieces around each octet. Near the ends of what may be read, single elements instead.
  using Piece = typename Shape::Piece;
  constexpr int kPieces = (Shape::kWords + Shape::kSpareWords) / Shape::kSpareWords;
  constexpr uintptr_t kMask = sizeof(Piece) - 1;
  const auto start = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(x + source.begin_row * row_bytes);
  const auto end = reinterpret_cast<uintptr_t>(x + source.end_row * row_bytes);
  if ((start & ~kMask) >= begin && start + (kQuad - 1) * row_bytes + kPieces * sizeof(Piece) <= end) {
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      const auto* aligned = reinterpret_cast<const Piece*>((start + r * row_bytes) & ~kMask);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (r < rows) reinterpret_cast<Piece&>(words[r][i * Shape::kSpareWords]) = __ldg(aligned + i);
      }
    }
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      ShiftDown<Shape::kWords, Shape::kSpareWords>(words[r], static_cast<uint32_t>(start + r * row_bytes) & kMask);
    }
    return;
  }
  using Element = std::conditional_t<Shape::kElementBytes == 2, uint16_t, uint8_t>;
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (r >= rows || source.first_column + column + i >= input.features) continue;
      const uint32_t element = __ldg(reinterpret_cast<const Element*>(address + r * row_bytes) + i);
      words[r][i * Shape::kElementBytes / 4] |= element << (i * Shape::kElementBytes % 4 * 8);
    }
  }
}

// The thread's rows as bf16 pairs; zero where x has none.
template <class Shape>
__device__ __forceinline__ void LoadPairs(const Input& input, const TileSource& source, uint32_t row, uint32_t column,
                                          uint32_t (&pairs)[kQuad][kPairs]) {
  const int rows = source.first_column + column < input.features ? source.rows - static_cast<int>(row) : 0;
  uint32_t words[kQuad][Shape::kWords + Shape::kSpareWords];
  if constexpr (Shape::kType == InputType::kBf16) {
    LoadQuad<Shape>(input, source, row, column, rows, words);
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) pairs[r][i] = words[r][i];
    }
  } else {
    // A tile is no wider than a block of features: one scale for a row.
    const uint64_t pitch = (static_cast<uint32_t>(input.features) + kBlock - 1) / kBlock;
    const float* input_scales = input.input_scales + source.first_row * pitch + source.first_column / kBlock;
    input_scales = Anchor(input_scales + row * pitch);
    float input_scale[kQuad];
#pragma unroll
    for (int r = 0; r < kQuad; ++r) input_scale[r] = r < rows ? __ldg(input_scales + r * pitch) : 0.0f;
    LoadQuad<Shape>(input, source, row, column, rows, words);
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
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

}  // namespace jax_tsq

#endif  // JAX_TSQ_CUDA_TILE_LOAD_CUH_
