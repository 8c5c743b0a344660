// What operations check of XLA's buffers before a kernel sees a pointer: types, shapes, sizes and alignment.

#ifndef JAX_TSQ_XLA_BUFFERS_H_
#define JAX_TSQ_XLA_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/input.h"
#include "xla/ffi/api/ffi.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

using Dims = std::vector<int64_t>;
using Buffers = std::vector<ffi::AnyBuffer>;

ffi::Error Invalid(const std::string& message);

// Type and shape, as in BF16[300, 256].
std::string ToString(const ffi::AnyBuffer& buffer);

Dims DimsOf(const ffi::AnyBuffer& buffer);

// The number of matrices in a batch, once its buffers passed CheckSize.
int64_t CountBatch(const Dims& batch);

// Checks that a buffer has a type and the shape batch + dims.
ffi::Error CheckBuffer(const std::string& name, const ffi::AnyBuffer& buffer, ffi::DataType type, Dims batch,
                       std::initializer_list<int64_t> dims);

// Checks that no dimension is negative and that no sum or product of a few of them overflows.
ffi::Error CheckSize(const std::string& name, const ffi::AnyBuffer& buffer);

// Checks the attribute of kernels whose thread blocks stay on their multiprocessors.
ffi::Error CheckMultiprocessors(int64_t most);

// Checks that a buffer starts where the copy engine can read and write it.
ffi::Error CheckAligned(const std::string& name, const ffi::AnyBuffer& buffer);

// The first error of several checks.
ffi::Error FirstOf(std::initializer_list<ffi::Error> errors);

// An Input together with the batch dimensions that all other buffers share.
struct BatchedInput {
  Input input;
  Dims batch;
};

// Reads x, and input_scales where x is float8_e4m3fn: the operand at index `scales_index`, which must be the last.
ffi::ErrorOr<BatchedInput> ReadInput(const Buffers& operands, size_t scales_index, bool pow_2_scales);

// Reads x of operations that take bfloat16 alone.
ffi::ErrorOr<BatchedInput> ReadBf16Input(const Buffers& operands, bool pow_2_scales);

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_BUFFERS_H_
