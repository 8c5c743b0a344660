// Stores around the caches.

#ifndef JAX_TSQ_CPU_STORE_H_
#define JAX_TSQ_CPU_STORE_H_

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/numerics.h"

namespace jax_tsq::cpu {

// Output beyond this is written around the caches, which saves reading its lines first: up to half as fast again.
inline constexpr int64_t kStreamingBytes = int64_t{1} << 20;

// Stores `count` of kBlock bytes.
inline void StoreBlock(const uint8_t* from, int count, [[maybe_unused]] bool streaming, uint8_t* to) {
#if defined(__SSE2__)
  constexpr int kLine = 64;  // part of one would cost more than it saves
  if (streaming && count == kBlock && reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    for (int i = 0; i < kBlock; i += sizeof(__m128i)) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), bytes);
    }
    return;
  }
#endif
  std::memcpy(to, from, count);
}

// Orders streaming stores before whatever tells other threads that the chunk is done.
inline void FinishStores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_STORE_H_
