#include "xla/buffers.h"

#include <sstream>
#include <utility>

#include "core/limits.h"
#include "core/numerics.h"

namespace jax_tsq {
namespace {

// Names the types in use here; XLA's own printing is undefined for types newer than its headers.
std::string ToString(ffi::DataType type) {
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

std::string ToString(ffi::DataType type, const Dims& dims) {
  std::ostringstream text;
  text << ToString(type) << "[";
  for (size_t i = 0; i < dims.size(); ++i) text << (i ? ", " : "") << dims[i];
  text << "]";
  return text.str();
}

}  // namespace

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

Dims DimsOf(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return Dims(dims.begin(), dims.end());
}

std::string ToString(const ffi::AnyBuffer& buffer) { return ToString(buffer.element_type(), DimsOf(buffer)); }

int64_t CountBatch(const Dims& batch) {
  int64_t count = 1;
  for (const int64_t dim : batch) count *= dim;
  return count;
}

ffi::Error CheckBuffer(const std::string& name, const ffi::AnyBuffer& buffer, ffi::DataType type, Dims batch,
                       std::initializer_list<int64_t> dims) {
  batch.insert(batch.end(), dims);
  if (buffer.element_type() == type && DimsOf(buffer) == batch) return ffi::Error::Success();
  return Invalid(name + " must be " + ToString(type, batch) + "; got " + ToString(buffer) + ".");
}

ffi::Error CheckSize(const std::string& name, const ffi::AnyBuffer& buffer) {
  int64_t elements = 1;
  for (const int64_t dim : buffer.dimensions()) {
    if (dim < 0 || dim > kMostElements || __builtin_mul_overflow(elements, dim, &elements) ||
        elements > kMostElements) {
      return Invalid(name + " is too large: " + ToString(buffer) + ".");
    }
  }
  return ffi::Error::Success();
}

ffi::Error CheckMultiprocessors(int64_t most) {
  if (most >= 0) return ffi::Error::Success();
  return Invalid("multiprocessors must be at least 1, or 0 for all; got " + std::to_string(most) + ".");
}

ffi::Error CheckAligned(const std::string& name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 == 0) return ffi::Error::Success();
  return Invalid(name + " must start on a multiple of 16 bytes.");
}

ffi::Error FirstOf(std::initializer_list<ffi::Error> errors) {
  for (const ffi::Error& error : errors) {
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::ErrorOr<BatchedInput> ReadInput(const Buffers& operands, size_t scales_index, bool pow_2_scales) {
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

ffi::ErrorOr<BatchedInput> ReadBf16Input(const Buffers& operands, bool pow_2_scales) {
  if (operands.empty() || operands[0].element_type() != ffi::BF16) {
    return ffi::Unexpected(
        Invalid("x must be BF16" + (operands.empty() ? "." : "; got " + ToString(operands[0]) + ".")));
  }
  return ReadInput(operands, operands.size(), pow_2_scales);
}

}  // namespace jax_tsq
