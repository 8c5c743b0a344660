// The native module: names of FFI targets -> handlers, for each platform.

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

#ifdef JAX_TSQ_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;

XLA_FFI_DECLARE_HANDLER_SYMBOL(SplitCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RowsCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DualCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(BlocksCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DswigluCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SplitCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RowsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DualCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(BlocksCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SwigluCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DswigluCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WgradCuda);

namespace {

struct Target {
  const char* platform;
  const char* name;
  XLA_FFI_Handler* handler;
};

constexpr Target kTargets[] = {
    {"cpu", "jax_tsq.split", SplitCpu},       {"cpu", "jax_tsq.ragged", RaggedCpu},
    {"cpu", "jax_tsq.rows", RowsCpu},         {"cpu", "jax_tsq.dual", DualCpu},
    {"cpu", "jax_tsq.blocks", BlocksCpu},     {"cpu", "jax_tsq.swiglu", SwigluCpu},
    {"cpu", "jax_tsq.dswiglu", DswigluCpu},
#ifdef JAX_TSQ_CUDA
    {"CUDA", "jax_tsq.split", SplitCuda},     {"CUDA", "jax_tsq.ragged", RaggedCuda},
    {"CUDA", "jax_tsq.rows", RowsCuda},       {"CUDA", "jax_tsq.dual", DualCuda},
    {"CUDA", "jax_tsq.blocks", BlocksCuda},   {"CUDA", "jax_tsq.swiglu", SwigluCuda},
    {"CUDA", "jax_tsq.dswiglu", DswigluCuda}, {"CUDA", "jax_tsq.matmul", MatmulCuda},
    {"CUDA", "jax_tsq.wgrad", WgradCuda},
#endif
};

}  // namespace

NB_MODULE(_native, module) {
#ifdef JAX_TSQ_CUDA
  module.attr("HAS_CUDA") = true;
  // The CUDA version of the kernels and the newest that the driver supports, 0 without a driver: 1000 major + 10 minor.
  module.def("cuda_versions", [] {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    return nb::make_tuple(CUDART_VERSION, driver);
  });
#else
  module.attr("HAS_CUDA") = false;
#endif
  module.def("targets", [] {
    nb::list targets;
    for (const Target& target : kTargets) {
      targets.append(nb::make_tuple(target.platform, target.name,
                                    nb::capsule(reinterpret_cast<void*>(target.handler), "xla._CUSTOM_CALL_TARGET")));
    }
    return targets;
  });
}
