// FFI handlers of jax_tsq.split: decode, check, launch.

#include "split/split.h"
#include "xla/handler.h"
#include "xla/problem.h"

namespace jax_tsq {
namespace {

constexpr char kName[] = "jax_tsq.split";

ffi::ErrorOr<SplitProblem> Decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, bool pow_2_scales) {
  auto operands = ReadOperands(args);
  if (!operands.has_value()) return ffi::Unexpected(operands.error());
  auto results = ReadResults(rets);
  if (!results.has_value()) return ffi::Unexpected(results.error());
  return MakeSplitProblem(*operands, *results, pow_2_scales);
}

ffi::Error Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, bool pow_2_scales) {
  return Guarded(kName, [&] {
    auto problem = Decode(args, rets, pow_2_scales);
    if (!problem.has_value()) return problem.error();
    SplitOnCpu(*problem, PoolExecutor(pool));
    return ffi::Error::Success();
  });
}

#ifdef JAX_TSQ_CUDA
ffi::Error Cuda(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, bool pow_2_scales) {
  return Guarded(kName, [&] {
    auto problem = Decode(args, rets, pow_2_scales);
    if (!problem.has_value()) return problem.error();
    return LaunchResult(kName, SplitOnCuda(*problem, stream));
  });
}
#endif

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SplitCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<bool>("pow_2_scales"));

#ifdef JAX_TSQ_CUDA
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SplitCuda, Cuda,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().RemainingArgs().RemainingRets().Attr<bool>("pow_2_scales"),
    {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace jax_tsq
