// FFI handler of jax_tsq.wgrad: decode, check, launch. There is a kernel for CUDA only.

#include "wgrad/wgrad.h"
#include "xla/handler.h"
#include "xla/problem.h"

namespace jax_tsq {
namespace {

constexpr char kName[] = "jax_tsq.wgrad";

ffi::Error Cuda(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded(kName, [&] {
    auto operands = ReadOperands(args);
    if (!operands.has_value()) return operands.error();
    auto results = ReadResults(rets);
    if (!results.has_value()) return results.error();
    auto problem = MakeWgradProblem(*operands, *results);
    if (!problem.has_value()) return problem.error();
    return LaunchResult(kName, WgradOnCuda(*problem, stream));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(WgradCuda, Cuda,
                              ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().RemainingArgs().RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_tsq
