// CUDA's errors as messages that live forever.

#ifndef JAX_TSQ_CUDA_ERRORS_H_
#define JAX_TSQ_CUDA_ERRORS_H_

#include <cuda_runtime.h>

namespace jax_tsq::cuda {

// Null, or what went wrong. The error is taken from the runtime, which would show it to whoever asks next.
inline const char* Message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Of the launch before.
inline const char* LaunchError() { return Message(cudaGetLastError()); }

}  // namespace jax_tsq::cuda

#endif  // JAX_TSQ_CUDA_ERRORS_H_
