// What the mappings of tiles share: limits, alignment and the numbering of blocks.

#ifndef JAX_TSQ_CUDA_LAUNCH_CUH_
#define JAX_TSQ_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "core/input.h"
#include "cuda/tile/shape.cuh"

namespace jax_tsq {

// The largest number of features or tokens: a row of x then has less than 2^32 bytes.
inline constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - kBlock;
inline constexpr int64_t kMaxThreadBlocks = std::numeric_limits<int32_t>::max();

// Division of numbers below 2^31 by a constant that the host knows: the blocks' own would cost as much as their loads.
struct Divisor {
  Divisor() = default;
  explicit Divisor(uint32_t value) : value(value) {
    while (uint64_t{1} << shift < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }
  __device__ __forceinline__ uint32_t Divide(uint32_t dividend) const {
    return static_cast<uint32_t>(uint64_t{dividend} * multiplier >> (31 + shift));
  }
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift = 0;
};

inline bool IsAligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether each octet of x is one aligned vector.
inline bool RowsAligned(const Input& input) {
  const int octet_bytes = input.type == InputType::kBf16 ? sizeof(uint4) : sizeof(uint2);
  return IsAligned(input.x, octet_bytes) && input.features % kOctet == 0;
}

// Null, or what was wrong with the launch, which is then forgotten.
inline const char* LaunchError() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_CUDA_LAUNCH_CUH_
