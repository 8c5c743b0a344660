// What the handlers of all operations do: guard -> decode -> launch -> error.

#ifndef JAX_TSQ_XLA_HANDLER_H_
#define JAX_TSQ_XLA_HANDLER_H_

#include <array>
#include <cstddef>
#include <exception>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace jax_tsq {

namespace ffi = ::xla::ffi;

// The handlers of one operation. `decode` makes a problem of buffers and attributes, after every check that protects
// memory; kernels have no others.
template <class Problem, class... Attributes>
class Handler {
 public:
  // `function` is the public one, which errors name. Attributes are named in the order that `decode` takes them.
  template <class... Names>
  constexpr Handler(const char* function,
                    ffi::ErrorOr<Problem> (*decode)(const Buffers& operands, const Buffers& results, Attributes...),
                    Names... attributes)
      : function_(function), decode_(decode), attributes_{attributes...} {
    static_assert(sizeof...(Names) == sizeof...(Attributes), "every attribute has a name");
  }

  // What the symbol of an operation calls, for as long as the process lives.
  ffi::Ffi* Cpu(void (*run)(const Problem&, const Executor&, CpuLevel)) const {
    return Bind<0>(
        ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(),
        [*this, run](ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes... values) {
          return Handle(args, rets, values..., [&](const Problem& problem) {
            run(problem, PoolExecutor(pool), BestCpuLevel());
            return ffi::Error::Success();
          });
        });
  }

  // `launch` returns null or a message, and does nothing that a CUDA graph cannot record.
  ffi::Ffi* Cuda(const char* (*launch)(const Problem&, Stream)) const {
    return Bind<0>(
        ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().RemainingArgs().RemainingRets(),
        [*this, launch](Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes... values) {
          return Handle(args, rets, values..., [&](const Problem& problem) {
            const char* const message = launch(problem, stream);
            if (message == nullptr) return ffi::Error::Success();
            return ffi::Error::Internal(std::string("the CUDA kernel could not be launched: ") + message);
          });
        },
        {ffi::Traits::kCmdBufferCompatible});
  }

 private:
  template <class Run>
  ffi::Error Handle(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, Attributes... values,
                    const Run& run) const {
    const auto failure = [&](ffi::ErrorCode code, const std::string& message) {
      return ffi::Error(code, std::string("jax_tsq.") + function_ + ": " + message);
    };
    try {
      const auto operands = ReadOperands(args);
      if (!operands.has_value()) return operands.error();
      const auto results = ReadResults(rets);
      if (!results.has_value()) return results.error();
      const auto problem = decode_(*operands, *results, values...);
      const ffi::Error error = problem.has_value() ? run(*problem) : problem.error();
      return error.success() ? error : failure(*error.errc(), error.message());
    } catch (const std::exception& exception) {  // memory that ran out, say: nothing may be thrown into XLA
      return failure(ffi::ErrorCode::kInternal, exception.what());
    }
  }

  // Binds the attributes from number `i` on, and then the function.
  template <size_t i, class Binding, class Function>
  ffi::Ffi* Bind(Binding&& binding, Function function, std::initializer_list<ffi::Traits> traits = {}) const {
    if constexpr (i < sizeof...(Attributes)) {
      using Attribute = std::tuple_element_t<i, std::tuple<Attributes...>>;
      return Bind<i + 1>(std::move(binding).template Attr<Attribute>(attributes_[i]), function, traits);
    } else {
      return std::move(binding).To(function, traits).release();
    }
  }

  const char* function_;
  ffi::ErrorOr<Problem> (*decode_)(const Buffers&, const Buffers&, Attributes...);
  std::array<const char*, sizeof...(Attributes)> attributes_;
};

}  // namespace jax_tsq

#endif  // JAX_TSQ_XLA_HANDLER_H_
