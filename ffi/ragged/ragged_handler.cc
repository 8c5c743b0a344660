// FFI handlers of jax_tsq.ragged: decode, check, launch.

#include "ragged/ragged.h"
#include "xla/handler.h"
#include "xla/problem.h"

namespace jax_tsq {
namespace {

constexpr char kName[] = "jax_tsq.ragged";

ffi::ErrorOr<RaggedProblem> Decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, bool pow_2_scales,
                                   bool aligned, bool flat) {
  auto operands = ReadOperands(args);
  if (!operands.has_value()) return ffi::Unexpected(operands.error());
  auto results = ReadResults(rets);
  if (!results.has_value()) return ffi::Unexpected(results.error());
  return MakeRaggedProblem(*operands, *results, pow_2_scales, aligned, flat);
}

ffi::Error Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, bool pow_2_scales, bool aligned,
               bool flat) {
  return Guarded(kName, [&] {
    auto problem = Decode(args, rets, pow_2_scales, aligned, flat);
    if (!problem.has_value()) return problem.error();
    RaggedOnCpu(*problem, PoolExecutor(pool));
    return ffi::Error::Success();
  });
}

#ifdef JAX_TSQ_CUDA
ffi::Error Cuda(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, bool pow_2_scales, bool aligned,
                bool flat) {
  return Guarded(kName, [&] {
    auto problem = Decode(args, rets, pow_2_scales, aligned, flat);
    if (!problem.has_value()) return problem.error();
    return LaunchResult(kName, RaggedOnCuda(*problem, stream));
  });
}
#endif

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RaggedCpu, Cpu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("pow_2_scales")
                                  .Attr<bool>("aligned")
                                  .Attr<bool>("flat"));

#ifdef JAX_TSQ_CUDA
XLA_FFI_DEFINE_HANDLER_SYMBOL(RaggedCuda, Cuda,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("pow_2_scales")
                                  .Attr<bool>("aligned")
                                  .Attr<bool>("flat"),
                              {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace jax_tsq
