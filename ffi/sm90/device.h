// What a launch has to know of the current device.

#ifndef JAX_TSQ_SM90_DEVICE_H_
#define JAX_TSQ_SM90_DEVICE_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/errors.h"
#include "sm90/tensor_map.h"

namespace jax_tsq::sm90 {

struct Device {
  int64_t multiprocessors;
  Encode encode;
};

// Returns null, or why no kernel of this folder runs there.
inline const char* FindDevice(Device& device) {
  int number = 0, major = 0, minor = 0, multiprocessors = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&number), cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number),
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number)}) {
    if (const char* message = cuda::Message(error)) return message;
  }
  if (major != 9 || minor != 0) return "this kernel runs on compute capability 9.0 only";
  static const Encode encode = FindEncode();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  device = {multiprocessors, encode};
  return nullptr;
}

// Multiprocessors for a kernel that may take `most`, 0 for all.
inline int64_t Multiprocessors(const Device& device, int64_t most) {
  return most > 0 ? std::min(most, device.multiprocessors) : device.multiprocessors;
}

}  // namespace jax_tsq::sm90

#endif  // JAX_TSQ_SM90_DEVICE_H_
