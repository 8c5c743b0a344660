// A square block on the host: up to kBlock x kBlock elements with one scale, quantized in both orientations.

#ifndef JAX_TSQ_CPU_SQUARE_H_
#define JAX_TSQ_CPU_SQUARE_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "cpu/convert.h"

namespace jax_tsq::cpu {

// bf16, 0 outside the block.
struct alignas(64) SquareElements {
  uint32_t words[kBlock][kRowWords];

  Bf16Bits* row(int i) { return reinterpret_cast<Bf16Bits*>(words[i]); }
};

struct SquareResult {
  int rows;
  int columns;
  uint8_t* values;  // [rows, columns]; rows are `values_stride` bytes apart
  int64_t values_stride;
  uint8_t* transposed;  // [columns, rows], likewise
  int64_t transposed_stride;
  float* dequant_scale;
  bool streaming;  // around the caches
};

struct SquareFunctions {
  // Rounds float32 to bf16. Any NaN will do for a NaN.
  void (*round)(const float* values, int count, Bf16Bits* elements);
  void (*quantize)(const SquareElements& elements, bool pow_2_scales, const SquareResult& result);
};

// For a level that this machine can run. All of them write the same bytes.
SquareFunctions SquareFor(CpuLevel level) noexcept;

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_SQUARE_H_
