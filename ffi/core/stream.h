// A CUDA stream as a name: what enqueues a kernel is declared without CUDA's headers.

#ifndef JAX_TSQ_CORE_STREAM_H_
#define JAX_TSQ_CORE_STREAM_H_

struct CUstream_st;

namespace jax_tsq {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_STREAM_H_
