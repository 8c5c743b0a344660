// The tile on the host: one block of up to kBlock tokens x kTileColumns features, quantized and transposed; and how
// tiles are spread over threads. Its callers, the operations, say where each block lies.

#ifndef JAX_TSQ_CPU_TILE_H_
#define JAX_TSQ_CPU_TILE_H_

#include <algorithm>
#include <cstdint>
#include <functional>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/executor.h"
#include "core/input.h"
#include "core/numerics.h"

namespace jax_tsq {

struct SplitProblem;
struct RaggedProblem;

// Columns of a tile: a cache line of fp8 input, two of bf16. Divides kBlock, so that a tile has one input scale a row.
inline constexpr int kTileColumns = 64;

// Tokens that share their scales, over all features.
struct TokenBlock {
  const void* x;              // first row; rows follow each other
  const float* input_scales;  // of the first row, for kFp8
  int rows;                   // 0 to kBlock; with 0, x is not looked at
  uint8_t* values;            // [features, tokens]; features are `values_stride` bytes apart
  int64_t values_stride;
  int tokens;             // from `rows` to kBlock; values from `rows` on are 0
  float* dequant_scales;  // [features]
};

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

// Writes the tile of `block` (rows > 0) that starts at feature `column`. `streaming` stores around the caches.
using TileFunction = void (*)(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch,
                              bool streaming);

enum class CpuLevel { kPortable, kAvx2, kAvx512 };

// All levels write the same bytes. Null where this machine cannot run `level`.
TileFunction TileFor(CpuLevel level) noexcept;
TileFunction Avx512Tile() noexcept;
// The fastest of them.
TileFunction BestTile() noexcept;

// A block that reads `rows` rows of x, all batches counted, from `first_row` on; its output is for the caller to fill
// in.
TokenBlock RowsOf(const Input& input, int64_t first_row, int rows) noexcept;

// Quantizes block_at(0) ... block_at(blocks - 1) on the executor's threads.
void QuantizeBlocks(const Input& input, int64_t blocks, const std::function<TokenBlock(int64_t)>& block_at,
                    const Executor& executor, TileFunction tile);

// The operations with a tile of choice, for tests.
void SplitOnCpu(const SplitProblem& problem, const Executor& executor, TileFunction tile);
void RaggedOnCpu(const RaggedProblem& problem, const Executor& executor, TileFunction tile);

// Turns subnormals on for the calling thread while it lives: XLA's threads run with them flushed to zero.
class DenormalGuard {
 public:
  DenormalGuard() noexcept : saved_(Read()) { Write(saved_ & ~kFlushBits); }
  ~DenormalGuard() { Write(saved_); }
  DenormalGuard(const DenormalGuard&) = delete;
  DenormalGuard& operator=(const DenormalGuard&) = delete;

 private:
#if defined(__SSE2__)
  using Register = uint32_t;
  static constexpr Register kFlushBits = 0x8040;  // MXCSR: FTZ, DAZ
  static Register Read() noexcept { return _mm_getcsr(); }
  static void Write(Register value) noexcept { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kFlushBits = 1u << 24;  // FPCR: FZ
  static Register Read() noexcept {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
    return value;
  }
  static void Write(Register value) noexcept { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kFlushBits = 0;
  static Register Read() noexcept { return 0; }
  static void Write(Register) noexcept {}
#endif

  const Register saved_;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_CPU_TILE_H_
