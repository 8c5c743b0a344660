// Tensor maps, which describe tensors in global memory to the copy engine.

#ifndef JAX_TSQ_SM90_TENSOR_MAP_H_
#define JAX_TSQ_SM90_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/errors.h"

namespace jax_tsq::sm90 {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function that makes tensor maps, or null. It is found at run time: the module loads without a driver.
inline Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool usable = cuda::Message(error) == nullptr && found == cudaDriverEntryPointSuccess;
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

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_TENSOR_MAP_H_
