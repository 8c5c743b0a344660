// IEEE arithmetic on XLA's threads.

#ifndef JAX_TSQ_CPU_DENORMALS_H_
#define JAX_TSQ_CPU_DENORMALS_H_

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jax_tsq::cpu {

// Turns subnormals on for the calling thread while it lives: XLA's threads run with them flushed to zero.
class DenormalGuard {
 public:
  DenormalGuard() noexcept : saved_(Read()) { Write(saved_ & ~kFlushBits); }
  ~DenormalGuard() { Write(saved_); }
  DenormalGuard(const DenormalGuard&) = delete;
  DenormalGuard& operator=(const DenormalGuard&) = delete;

 private:
#if defined(__SSE2__)
  using Register = uint32_t;
  static constexpr Register kFlushBits = 0x8040;  // MXCSR: FTZ, DAZ
  static Register Read() noexcept { return _mm_getcsr(); }
  static void Write(Register value) noexcept { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kFlushBits = 1u << 24;  // FPCR: FZ
  static Register Read() noexcept {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
    return value;
  }
  static void Write(Register value) noexcept { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kFlushBits = 0;
  static Register Read() noexcept { return 0; }
  static void Write(Register) noexcept {}
#endif

  const Register saved_;
};

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_DENORMALS_H_
