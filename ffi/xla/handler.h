// What the handlers of all operations do: guard -> decode -> launch -> error.

#ifndef JAX_TSQ_XLA_HANDLER_H_
#define JAX_TSQ_XLA_HANDLER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

// What XLA passes to a handler of any operation.
struct Call {
  Buffers operands, results;
  ffi::Dictionary attributes;
};

// XLA's bindings, instantiated once for all operations. A handler lives as long as the process, and catches what `body`
// throws. Errors name `function`, the public one.
ffi::Ffi* BindCpu(const char* function, std::function<ffi::Error(const Call&, const Executor&)> body);
ffi::Ffi* BindCuda(const char* function, std::function<ffi::Error(const Call&, Stream)> body);

// Checks that a call has so many attributes, or reads one of them.
ffi::Error CheckAttributes(const ffi::Dictionary& attributes, size_t count);
ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, bool& value);
ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, int64_t& value);
ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, float& value);

// The handlers of one operation. `decode` makes a problem of buffers and attributes, after every check that protects
// memory; kernels have no others.
template <class Problem, class... Attributes>
class Handler {
 public:
  // Attributes are named in the order that `decode` takes them.
  template <class... Names>
  constexpr Handler(const char* function,
                    ffi::ErrorOr<Problem> (*decode)(const Buffers& operands, const Buffers& results, Attributes...),
                    Names... attributes)
      : function_(function), decode_(decode), attributes_{attributes...} {
    static_assert(sizeof...(Names) == sizeof...(Attributes), "every attribute has a name");
  }

  // What the symbol of an operation calls.
  ffi::Ffi* Cpu(void (*run)(const Problem&, const Executor&, CpuLevel)) const {
    return BindCpu(function_, [*this, run](const Call& call, const Executor& executor) {
      const ffi::ErrorOr<Problem> problem = Decode(call, kIndices);
      if (!problem.has_value()) return problem.error();
      run(*problem, executor, BestCpuLevel());
      return ffi::Error::Success();
    });
  }

  // `launch` returns null or a message, and does nothing that a CUDA graph cannot record.
  ffi::Ffi* Cuda(const char* (*launch)(const Problem&, Stream)) const {
    return BindCuda(function_, [*this, launch](const Call& call, Stream stream) {
      const ffi::ErrorOr<Problem> problem = Decode(call, kIndices);
      if (!problem.has_value()) return problem.error();
      const char* const message = launch(*problem, stream);
      if (message == nullptr) return ffi::Error::Success();
      return ffi::Error::Internal(std::string("the CUDA kernel could not be launched: ") + message);
    });
  }

 private:
  static constexpr std::index_sequence_for<Attributes...> kIndices = {};

  template <size_t... i>
  ffi::ErrorOr<Problem> Decode(const Call& call, std::index_sequence<i...>) const {
    std::tuple<Attributes...> values;
    const ffi::Error error = FirstOf({
        CheckAttributes(call.attributes, sizeof...(i)),
        ReadAttribute(call.attributes, attributes_[i], std::get<i>(values))...,
    });
    if (error.failure()) return ffi::Unexpected(error);
    return decode_(call.operands, call.results, std::get<i>(values)...);
  }

  const char* function_;
  ffi::ErrorOr<Problem> (*decode_)(const Buffers&, const Buffers&, Attributes...);
  std::array<const char*, sizeof...(Attributes)> attributes_;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_HANDLER_H_
