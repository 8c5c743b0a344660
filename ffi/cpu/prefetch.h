// Reading ahead.

#ifndef JAX_TSQ_CPU_PREFETCH_H_
#define JAX_TSQ_CPU_PREFETCH_H_

#include <algorithm>
#include <cstdint>

#include "core/numerics.h"

namespace jax_tsq::cpu {

// Lines of x that a later tile will read, row by row: hardware prefetchers follow within a row, none finds the next.
// The cache has few places for reads that are under way, so that they are spread over the work of a tile, which calls
// Fetch() kFetches times.
inline constexpr int kFetches = kBlock / 2;
class Prefetch {
 public:
  Prefetch() noexcept = default;
  // `rows` rows of `row_bytes` that are `stride` bytes apart.
  Prefetch(const void* x, int64_t stride, int row_bytes, int rows) noexcept
      : at_(reinterpret_cast<uintptr_t>(x)),
        next_row_(stride - CeilDiv(row_bytes, kBytes) * kBytes),
        row_(CeilDiv(row_bytes, kBytes)),
        left_in_row_(row_),
        left_(rows * row_),
        at_once_(CeilDiv(left_, kFetches)) {}

  void Fetch() noexcept {
    for (int i = std::min(at_once_, left_); i > 0; --i, --left_) {
      for (int byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(at_ + byte), 0, 2);
      at_ += kBytes;
      if (--left_in_row_ > 0) continue;
      at_ += next_row_;
      left_in_row_ = row_;
    }
  }

 private:
  static constexpr int kBytes = 256;  // of a row, fetched together
  uintptr_t at_ = 0;
  int64_t next_row_ = 0;  // from the end of one
  int row_ = 0;
  int left_in_row_ = 0;
  int left_ = 0;
  int at_once_ = 0;
};

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_PREFETCH_H_
