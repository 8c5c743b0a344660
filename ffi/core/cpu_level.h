// Levels of instructions that CPU kernels are compiled for.

#ifndef JAX_TSQ_CORE_CPU_LEVEL_H_
#define JAX_TSQ_CORE_CPU_LEVEL_H_

#if defined(__x86_64__) && defined(__GNUC__)
#define JAX_TSQ_X86_LEVELS
#endif

namespace jax_tsq {

enum class CpuLevel { kPortable, kAvx2, kAvx512 };

// Whether this machine has the instructions.
inline bool CanRun(CpuLevel level) noexcept {
#ifdef JAX_TSQ_X86_LEVELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == CpuLevel::kAvx2) return avx2;
  if (level == CpuLevel::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi");
  }
#endif
  return level == CpuLevel::kPortable;
}

// The fastest that this machine can run.
inline CpuLevel BestCpuLevel() noexcept {
  static const CpuLevel best = CanRun(CpuLevel::kAvx512) ? CpuLevel::kAvx512
                               : CanRun(CpuLevel::kAvx2) ? CpuLevel::kAvx2
                                                         : CpuLevel::kPortable;
  return best;
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_CPU_LEVEL_H_
