// CUDA errors end the harness.

#ifndef JAX_TSQ_HARNESS_CUDA_ERRORS_H_
#define JAX_TSQ_HARNESS_CUDA_ERRORS_H_

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace jax_tsq::harness {

inline void CheckCuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("ERROR CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// For what a launch returns: null or a message.
inline void CheckLaunch(const char* error) {
  if (error == nullptr) return;
  std::printf("ERROR %s\n", error);
  std::exit(1);
}

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_CUDA_ERRORS_H_
