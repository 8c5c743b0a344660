// What operations check of XLA's buffers before a kernel sees a pointer: types, shapes, sizes and alignment.

#ifndef JAX_TSQ_XLA_BUFFERS_H_
#define JAX_TSQ_XLA_BUFFERS_H_

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "core/input.h"
#include "core/limits.h"
#include "core/numerics.h"
#include "xla/ffi/api/ffi.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

using Dims = std::vector<int64_t>;
using Buffers = std::vector<ffi::AnyBuffer>;

inline ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

// Names the types in use here; XLA's own printing is undefined for types newer than its headers.
inline std::string ToString(ffi::DataType type) {
  switch (type) {
    case ffi::BF16:
      return "BF16";
    case ffi::F8E4M3FN:
      return "F8E4M3FN";
    case ffi::F32:
      return "F32";
    case ffi::S32:
      return "S32";
    default:
      return "XLA type " + std::to_string(static_cast<int>(type)) + " ";
  }
}

inline std::string ToString(ffi::DataType type, const Dims& dims) {
  std::ostringstream text;
  text << ToString(type) << "[";
  for (size_t i = 0; i < dims.size(); ++i) text << (i ? ", " : "") << dims[i];
  text << "]";
  return text.str();
}

inline Dims DimsOf(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return Dims(dims.begin(), dims.end());
}

inline std::string ToString(const ffi::AnyBuffer& buffer) { return ToString(buffer.element_type(), DimsOf(buffer)); }

// The number of matrices in a batch, once its buffers passed CheckSize.
inline int64_t CountBatch(const Dims& batch) {
  int64_t count = 1;
  for (const int64_t dim : batch) count *= dim;
  return count;
}

// Reads all operands or results that are left.
template <typename Remaining, typename Get>
ffi::ErrorOr<Buffers> ReadAll(const Remaining& remaining, Get get) {
  Buffers buffers;
  buffers.reserve(remaining.size());
  for (size_t i = 0; i < remaining.size(); ++i) {
    auto buffer = get(remaining, i);
    if (!buffer.has_value()) return ffi::Unexpected(buffer.error());
    buffers.push_back(*buffer);
  }
  return buffers;
}

inline ffi::ErrorOr<Buffers> ReadOperands(const ffi::RemainingArgs& args) {
  return ReadAll(args, [](const auto& all, size_t i) { return all.template get<ffi::AnyBuffer>(i); });
}

inline ffi::ErrorOr<Buffers> ReadResults(const ffi::RemainingRets& rets) {
  return ReadAll(rets, [](const auto& all, size_t i) -> ffi::ErrorOr<ffi::AnyBuffer> {
    auto result = all.template get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return ffi::Unexpected(result.error());
    return **result;
  });
}

// Checks that a buffer has a type and the shape batch + dims.
inline ffi::Error CheckBuffer(const std::string& name, const ffi::AnyBuffer& buffer, ffi::DataType type, Dims batch,
                              std::initializer_list<int64_t> dims) {
  batch.insert(batch.end(), dims);
  if (buffer.element_type() == type && DimsOf(buffer) == batch) return ffi::Error::Success();
  return Invalid(name + " must be " + ToString(type, batch) + "; got " + ToString(buffer) + ".");
}

// Checks that no dimension is negative and that no sum or product of a few of them overflows.
inline ffi::Error CheckSize(const std::string& name, const ffi::AnyBuffer& buffer) {
  int64_t elements = 1;
  for (const int64_t dim : buffer.dimensions()) {
    if (dim < 0 || dim > kMostElements || __builtin_mul_overflow(elements, dim, &elements) ||
        elements > kMostElements) {
      return Invalid(name + " is too large: " + ToString(buffer) + ".");
    }
  }
  return ffi::Error::Success();
}

// Checks the attribute of kernels whose thread blocks stay on their multiprocessors.
inline ffi::Error CheckMultiprocessors(int64_t most) {
  if (most >= 0) return ffi::Error::Success();
  return Invalid("multiprocessors must be at least 1, or 0 for all; got " + std::to_string(most) + ".");
}

// Checks that a buffer starts where the copy engine can read and write it.
inline ffi::Error CheckAligned(const std::string& name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 == 0) return ffi::Error::Success();
  return Invalid(name + " must start on a multiple of 16 bytes.");
}

// The first error of several checks.
inline ffi::Error FirstOf(std::initializer_list<ffi::Error> errors) {
  for (const ffi::Error& error : errors) {
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// An Input together with the batch dimensions that all other buffers share.
struct BatchedInput {
  Input input;
  Dims batch;
};

// Reads x, and input_scales where x is float8_e4m3fn: the operand at index `scales_index`, which must be the last.
inline ffi::ErrorOr<BatchedInput> ReadInput(const Buffers& operands, size_t scales_index, bool pow_2_scales) {
  if (operands.size() < scales_index) return ffi::Unexpected(Invalid("too few operands."));
  const ffi::AnyBuffer& x = operands[0];
  Dims batch = DimsOf(x);
  if (batch.size() < 2) return ffi::Unexpected(Invalid("x must have at least two dimensions."));
  const ffi::Error size_error = CheckSize("x", x);
  if (size_error.failure()) return ffi::Unexpected(size_error);
  Input input = {};
  input.x = x.untyped_data();
  input.pow_2_scales = pow_2_scales;
  input.features = batch.back();
  batch.pop_back();
  input.tokens = batch.back();
  batch.pop_back();
  input.batch = CountBatch(batch);

  const bool is_fp8 = x.element_type() == ffi::F8E4M3FN;
  if (!is_fp8 && x.element_type() != ffi::BF16) {
    return ffi::Unexpected(Invalid("x must be BF16 or F8E4M3FN; got " + ToString(x) + "."));
  }
  if (operands.size() != scales_index + is_fp8) {
    return ffi::Unexpected(Invalid("input_scales must be given for F8E4M3FN x, and only then."));
  }
  input.type = is_fp8 ? InputType::kFp8 : InputType::kBf16;
  if (is_fp8) {
    const ffi::AnyBuffer& scales = operands[scales_index];
    const ffi::Error error =
        CheckBuffer("input_scales", scales, ffi::F32, batch, {input.tokens, CeilDiv(input.features, kBlock)});
    if (error.failure()) return ffi::Unexpected(error);
    input.input_scales = static_cast<const float*>(scales.untyped_data());
  }
  return BatchedInput{input, batch};
}

// Reads x of operations that take bfloat16 alone.
inline ffi::ErrorOr<BatchedInput> ReadBf16Input(const Buffers& operands, bool pow_2_scales) {
  if (operands.empty() || operands[0].element_type() != ffi::BF16) {
    return ffi::Unexpected(
        Invalid("x must be BF16" + (operands.empty() ? "." : "; got " + ToString(operands[0]) + ".")));
  }
  return ReadInput(operands, operands.size(), pow_2_scales);
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_BUFFERS_H_
