// ragged_matmul: y = x w[e] for the rows of every group e, from FP8 operands whose group sizes only the device knows.
// The input gradient is the same product, with the other side of w summed over.

#ifndef JAX_TSQ_MATMUL_MATMUL_H_
#define JAX_TSQ_MATMUL_MATMUL_H_

#include <cstdint>

#include "core/numerics.h"
#include "core/stream.h"

namespace jax_tsq {

// For row t of group e, with b over blocks of kBlock features and c the block of column n:
//
//     product[b] = sum over the features k of b of x[t][k] * w[e][n][k]
//     y[t][n] = sum over b of product[b] * (x_scale[b][t] * w_scale[e][b][c])
//
// summed in float32 and rounded once. Rows past the last group are 0. The last block of features and that of columns
// may be shorter.
//
// A handler checks what the kernel's copies ask for: features are a multiple of 16, columns one of 8, x, w and y start
// on a multiple of 16 bytes. Sizes are limited by kMostTokens, kMostProductFeatures and kMostProductGroups.
struct MatmulProblem {
  const uint8_t* x;            // [batch, tokens, features] float8_e4m3fn
  const float* x_scales;       // [batch, CeilDiv(features, kBlock), tokens]
  const uint8_t* w;            // [batch, groups, columns, features] float8_e4m3fn
  const float* w_scales;       // [batch, groups, blocks of features, blocks of columns], or the last two exchanged
  const int32_t* group_sizes;  // [batch, groups]; any values, see core/groups.h
  void* y;                     // [batch, tokens, columns] bfloat16
  bool w_scales_by_column;     // blocks of columns come first
  int64_t batch;
  int64_t groups;
  int64_t tokens;
  int64_t features;             // summed over
  int64_t columns;              // features of y
  int64_t multiprocessors = 0;  // that the kernel takes at most, but two; 0 for all
};

// Enqueues the kernel, which needs compute capability 9.0. Returns null, or a message that lives forever.
const char* MatmulOnCuda(const MatmulProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_MATMUL_MATMUL_H_
