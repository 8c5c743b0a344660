// How kernels are timed: beside a device-to-device copy of as many bytes, or by the rate of their products.

#ifndef JAX_TSQ_HARNESS_BENCHMARK_H_
#define JAX_TSQ_HARNESS_BENCHMARK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace jax_tsq::harness {

// Device memory that lives as long as the arena. Arrays are aligned to 256 bytes, as XLA's are.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* AllocateBytes(size_t bytes);
  template <class T>
  T* Allocate(size_t count) {
    return static_cast<T*>(AllocateBytes(count * sizeof(T)));
  }
  template <class T>
  T* Upload(const std::vector<T>& data) {
    return static_cast<T*>(UploadBytes(data.data(), data.size() * sizeof(T)));
  }
  // Nearly normal numbers, different ones in every array.
  uint16_t* Bf16(size_t count);
  // The same, of which about the largest of 128 is 448, as the quantizer makes them.
  uint8_t* Fp8(size_t count);
  float* Scales(size_t count);

 private:
  void* UploadBytes(const void* data, size_t bytes);

  std::vector<void*> chunks_;
  size_t left_ = 0;  // in the last chunk
  uint8_t* next_ = nullptr;
  uint64_t arrays_ = 0;
};

// sum[i] += x[i] for all elements, on the default stream. Both are aligned to 16 bytes, and 4 divides their number.
void AddFloats(float* sum, const float* x, size_t count);

// One set of arrays as a launch, which returns null or a message.
struct Prepared {
  std::function<const char*()> launch;
  std::function<double()> error = nullptr;  // of a product, relative to its size; once it was launched
};

struct Benchmark {
  std::string name;
  double bytes;       // read and written once each; or 0
  double operations;  // of a product; or 0
  std::function<Prepared(Arena&)> prepare;
};

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_BENCHMARK_H_
