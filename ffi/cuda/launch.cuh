// What the launches of kernels share: limits, occupancy, alignment, division and errors.

#ifndef JAX_TSQ_CUDA_LAUNCH_CUH_
#define JAX_TSQ_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "core/numerics.h"
#include "cuda/errors.h"

namespace jax_tsq::cuda {

// The largest number of features or tokens: a row of x then has less than 2^32 bytes.
inline constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - kBlock;
inline constexpr int64_t kMaxThreadBlocks = std::numeric_limits<int32_t>::max();

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#ifdef __CUDA_ARCH__
inline constexpr int kArchitecture = __CUDA_ARCH__;
#else
inline constexpr int kArchitecture = 0;  // the host asks for no occupancy
#endif

// The occupancy that the register allocation must allow, where a kernel asks for `ctas_per_sm`, tuned on Hopper. Less
// elsewhere: most other GPUs hold fewer threads, those without fp8 conversions need registers to emulate them, and for
// the Blackwell of data centers only a simple kernel, with aligned rows, does not spill.
constexpr int MinCtasPerSm(int ctas_per_sm, bool simple) {
  constexpr bool kBlackwell = kArchitecture >= 1000 && kArchitecture < 1100;
  if (kArchitecture == 900 || (kBlackwell && simple)) return ctas_per_sm;
  return ctas_per_sm > 1 ? ctas_per_sm * 2 / 3 : 1;
}

// Division of numbers below 2^31 by a constant that the host knows: the blocks' own would cost as much as their loads.
struct Divisor {
  Divisor() = default;
  // Where `count` is 0 nothing is divided.
  explicit Divisor(int64_t count) : value(count > 0 ? static_cast<uint32_t>(count) : 1) {
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

// The same pointer, from which the compiler takes offsets instead of multiplying anew for each of them.
template <class T>
__device__ __forceinline__ T* Anchor(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

inline bool IsAligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_LAUNCH_CUH_
