// XLA buffers -> plain problems. Every check that protects memory is made here, before a kernel sees a pointer.

#ifndef JAX_TSQ_XLA_PROBLEM_H_
#define JAX_TSQ_XLA_PROBLEM_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "core/groups.h"
#include "core/input.h"
#include "core/limits.h"
#include "core/numerics.h"
#include "ragged/ragged.h"
#include "split/split.h"
#include "wgrad/wgrad.h"
#include "xla/ffi/api/ffi.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

using Dims = std::vector<int64_t>;
using Buffers = std::vector<ffi::AnyBuffer>;

inline ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("jax_tsq: " + message); }

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
  return Invalid(name + " must be " + ToString(type, batch) + "; got " +
                 ToString(buffer.element_type(), DimsOf(buffer)) + ".");
}

// Checks that no dimension is negative and that no sum or product of a few of them overflows.
inline ffi::Error CheckSize(const std::string& name, const ffi::AnyBuffer& buffer) {
  int64_t elements = 1;
  for (const int64_t dim : buffer.dimensions()) {
    if (dim < 0 || dim > kMostElements || __builtin_mul_overflow(elements, dim, &elements) ||
        elements > kMostElements) {
      return Invalid(name + " is too large: " + ToString(buffer.element_type(), DimsOf(buffer)) + ".");
    }
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
  input.batch = 1;
  for (const int64_t dim : batch) input.batch *= dim;

  const bool is_fp8 = x.element_type() == ffi::F8E4M3FN;
  if (!is_fp8 && x.element_type() != ffi::BF16) {
    return ffi::Unexpected(Invalid("x must be BF16 or F8E4M3FN; got " + ToString(x.element_type(), DimsOf(x)) + "."));
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

// Operands x, [input_scales]; results all outs, then all scales. The experts' token counts are the outs' shapes.
inline ffi::ErrorOr<SplitProblem> MakeSplitProblem(const Buffers& operands, const Buffers& results, bool pow_2_scales) {
  auto read = ReadInput(operands, 1, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (results.size() % 2 != 0) return ffi::Unexpected(Invalid("results must be as many outs as scales."));

  SplitProblem problem = {input, {}};
  const size_t experts = results.size() / 2;
  problem.experts.reserve(experts);
  int64_t first_token = 0;
  for (size_t i = 0; i < experts; ++i) {
    const ffi::AnyBuffer &out = results[i], &scales = results[experts + i];
    const auto dims = out.dimensions();
    const int64_t tokens = dims.size() == 0 ? -1 : dims[dims.size() - 1];
    if (tokens < 0 || tokens > input.tokens - first_token) {
      return ffi::Unexpected(Invalid("outs must have as many tokens together as x, " + std::to_string(input.tokens) +
                                     "; got more, or a negative number, at expert " + std::to_string(i) + "."));
    }
    ffi::Error error =
        CheckBuffer("outs[" + std::to_string(i) + "]", out, ffi::F8E4M3FN, batch, {input.features, tokens});
    if (error.failure()) return ffi::Unexpected(error);
    error = CheckBuffer("scales[" + std::to_string(i) + "]", scales, ffi::F32, batch,
                        {CeilDiv(tokens, kBlock), input.features});
    if (error.failure()) return ffi::Unexpected(error);
    problem.experts.push_back(
        {first_token, tokens, static_cast<uint8_t*>(out.untyped_data()), static_cast<float*>(scales.untyped_data())});
    first_token += tokens;
  }
  if (first_token != input.tokens) {
    return ffi::Unexpected(Invalid("outs must have as many tokens together as x, " + std::to_string(input.tokens) +
                                   "; got " + std::to_string(first_token) + "."));
  }
  return problem;
}

// Operands x, group_sizes, [input_scales]; results values, scales, padded group sizes.
inline ffi::ErrorOr<RaggedProblem> MakeRaggedProblem(const Buffers& operands, const Buffers& results, bool pow_2_scales,
                                                     bool aligned, bool flat) {
  auto read = ReadInput(operands, 2, pow_2_scales);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  const auto& [input, batch] = *read;
  if (results.size() != 3) return ffi::Unexpected(Invalid("results must be values, scales and group sizes."));

  const auto size_dims = operands[1].dimensions();
  const int64_t groups = size_dims.size() == 0 ? -1 : size_dims[size_dims.size() - 1];
  if (groups < 0) return ffi::Unexpected(Invalid("group_sizes must have at least one dimension."));
  const int64_t padded = input.tokens > kMostTokens ? -1 : PaddedTokens(input.tokens, groups, aligned);
  if (padded < 0 || padded > kMostTokens) {
    return ffi::Unexpected(Invalid("x and group_sizes need more than 2**31 - 128 padded tokens."));
  }
  if (padded > 0 && input.features > kMostElements / padded) {
    return ffi::Unexpected(
        Invalid("x is too large: " + ToString(operands[0].element_type(), DimsOf(operands[0])) + "."));
  }
  const ffi::Error errors[] = {
      CheckBuffer("group_sizes", operands[1], ffi::S32, batch, {groups}),
      flat ? CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.features * padded})
           : CheckBuffer("values", results[0], ffi::F8E4M3FN, batch, {input.features, padded}),
      CheckBuffer("scales", results[1], ffi::F32, batch, {padded / kBlock, input.features}),
      CheckBuffer("padded group sizes", results[2], ffi::S32, batch, {groups}),
  };
  for (const ffi::Error& error : errors) {
    if (error.failure()) return ffi::Unexpected(error);
  }
  RaggedProblem problem = {};
  problem.input = input;
  problem.group_sizes = static_cast<const int32_t*>(operands[1].untyped_data());
  problem.groups = groups;
  problem.padded_tokens = padded;
  problem.aligned = aligned;
  problem.flat = flat;
  problem.values = static_cast<uint8_t*>(results[0].untyped_data());
  problem.dequant_scales = static_cast<float*>(results[1].untyped_data());
  problem.padded_sizes = static_cast<int32_t*>(results[2].untyped_data());
  return problem;
}

// Operands x, its scales, dy, its scales, group_sizes; the result dW.
inline ffi::ErrorOr<WgradProblem> MakeWgradProblem(const Buffers& operands, const Buffers& results) {
  if (operands.size() != 5 || results.size() != 1) {
    return ffi::Unexpected(Invalid("wgrad takes x, its scales, dy, its scales and group_sizes, and returns dW."));
  }
  const ffi::AnyBuffer &x = operands[0], &dy = operands[2], &sizes = operands[4], &dw = results[0];
  if (x.dimensions().size() < 2 || dy.dimensions().size() < 2 || sizes.dimensions().size() < 1) {
    return ffi::Unexpected(Invalid("x and dy must have at least two dimensions, and group_sizes one."));
  }
  Dims batch = DimsOf(x);
  const int64_t tokens = batch.back();
  batch.pop_back();
  const int64_t x_features = batch.back();
  batch.pop_back();
  const int64_t dy_features = dy.dimensions()[dy.dimensions().size() - 2];
  const int64_t groups = sizes.dimensions()[sizes.dimensions().size() - 1];
  const bool bf16 = dw.element_type() == ffi::BF16;
  if (tokens < 0 || tokens > kMostTokens || std::max(x_features, dy_features) > kMostProductFeatures) {
    return ffi::Unexpected(Invalid("x or dy is too large."));
  }
  const ffi::Error errors[] = {
      CheckSize("x", x),
      CheckSize("dy", dy),
      CheckSize("dW", dw),
      CheckBuffer("x", x, ffi::F8E4M3FN, batch, {x_features, tokens}),
      CheckBuffer("x's scales", operands[1], ffi::F32, batch, {tokens / kBlock, x_features}),
      CheckBuffer("dy", dy, ffi::F8E4M3FN, batch, {dy_features, tokens}),
      CheckBuffer("dy's scales", operands[3], ffi::F32, batch, {tokens / kBlock, dy_features}),
      CheckBuffer("group_sizes", sizes, ffi::S32, batch, {groups}),
      CheckBuffer("dW", dw, bf16 ? ffi::BF16 : ffi::F32, batch, {groups, x_features, dy_features}),
  };
  for (const ffi::Error& error : errors) {
    if (error.failure()) return ffi::Unexpected(error);
  }
  // What the kernel's copies ask for
  if (tokens % kBlock != 0 || x_features % 4 != 0 || dy_features % (bf16 ? 8 : 4) != 0 || groups > kMostProductGroups) {
    return ffi::Unexpected(
        Invalid("the native wgrad needs tokens that are a multiple of 128, features of x that are a multiple of 4, "
                "features of dy that are one of 4 (of 8 for BF16 dW), and at most 1024 groups; got x " +
                ToString(x.element_type(), DimsOf(x)) + ", dy " + ToString(dy.element_type(), DimsOf(dy)) + ", dW " +
                ToString(dw.element_type(), DimsOf(dw)) + "."));
  }
  for (const void* data : {x.untyped_data(), operands[1].untyped_data(), dy.untyped_data(), operands[3].untyped_data(),
                           dw.untyped_data()}) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
      return ffi::Unexpected(Invalid("the native wgrad needs arrays that start on a multiple of 16 bytes."));
    }
  }
  WgradProblem problem = {};
  problem.x = static_cast<const uint8_t*>(x.untyped_data());
  problem.x_scales = static_cast<const float*>(operands[1].untyped_data());
  problem.dy = static_cast<const uint8_t*>(dy.untyped_data());
  problem.dy_scales = static_cast<const float*>(operands[3].untyped_data());
  problem.group_sizes = static_cast<const int32_t*>(sizes.untyped_data());
  problem.dw = dw.untyped_data();
  problem.dw_is_bf16 = bf16;
  problem.batch = 1;
  for (const int64_t dim : batch) problem.batch *= dim;
  problem.groups = groups;
  problem.x_features = x_features;
  problem.dy_features = dy_features;
  problem.tokens = tokens;
  return problem;
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_PROBLEM_H_
