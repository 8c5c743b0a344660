#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "harness/benchmark.h"
#include "harness/commands.h"
#include "harness/cuda_errors.h"
#include "harness/operation.h"

namespace jax_tsq::harness {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 26;
constexpr size_t kRotated = size_t{1} << 29;  // bytes that a round touches at least, so that caches do not help

// --- Data ------------------------------------------------------------------------------------------------------------

__device__ uint32_t Hash(uint64_t index) {
  uint64_t h = (index + 1) * 0x9E3779B97F4A7C15ull;
  h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>(h >> 32);
}

// Sums of four uniform numbers, nearly normal, up to 510.
__device__ float Normal(uint64_t index) {
  const uint32_t h = Hash(index);
  return static_cast<int>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510;
}

// x[i] = make(number of the element) for all elements; `array` makes the numbers differ between arrays.
template <class T, class Make>
__global__ void Fill(T* x, size_t count, uint64_t array, Make make) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    x[i] = make(i + (array << 40));
  }
}

struct MakeBf16 {
  __device__ __nv_bfloat16 operator()(uint64_t i) const { return __float2bfloat16(Normal(i) * (1.0f / 148)); }
};
struct MakeFp8 {
  __device__ uint8_t operator()(uint64_t i) const {
    return __nv_cvt_float_to_fp8(Normal(i) * (448.0f / 400), __NV_SATFINITE, __NV_E4M3);
  }
};
struct MakeScale {
  __device__ float operator()(uint64_t i) const { return (Hash(i) % 1000 + 1000) * 1e-6f; }
};

__global__ void Add(float4* sum, const float4* x, size_t count) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    const float4 a = sum[i], b = x[i];
    sum[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
}

// --- Time ------------------------------------------------------------------------------------------------------------

class Timer {
 public:
  Timer() {
    CheckCuda(cudaEventCreate(&start_));
    CheckCuda(cudaEventCreate(&stop_));
  }
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  // Milliseconds of one of `repeats` calls in a row.
  float Time(int repeats, const std::function<void()>& enqueue) {
    CheckCuda(cudaEventRecord(start_));
    for (int i = 0; i < repeats; ++i) enqueue();
    CheckCuda(cudaEventRecord(stop_));
    CheckCuda(cudaEventSynchronize(stop_));
    float ms;
    CheckCuda(cudaEventElapsedTime(&ms, start_, stop_));
    return ms / repeats;
  }

 private:
  cudaEvent_t start_, stop_;
};

float Median(std::vector<float> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Beside copies, in turns.
void TimeBytes(const Benchmark& benchmark) {
  constexpr int kSamples = 21;
  constexpr float kSampleMs = 1.0f;  // a sample repeats the launch about so long
  const auto bytes = static_cast<size_t>(benchmark.bytes);
  const size_t sets = std::max<size_t>(2, kRotated / std::max<size_t>(bytes, 1) + 1);
  Arena arena;
  std::vector<Prepared> prepared;
  for (size_t i = 0; i < sets; ++i) prepared.push_back(benchmark.prepare(arena));
  const size_t half = (bytes / 2 + 511) / 512 * 512;  // an unaligned copy is slower
  uint8_t* copied = arena.Fp8(2 * half * sets);

  size_t next_kernel = 0, next_copy = 0;
  const auto run_kernel = [&] { CheckLaunch(prepared[next_kernel++ % sets].launch()); };
  const auto run_copy = [&] {
    uint8_t* pair = copied + next_copy++ % sets * 2 * half;
    CheckCuda(cudaMemcpyAsync(pair, pair + half, half, cudaMemcpyDeviceToDevice, nullptr));
  };
  Timer timer;
  timer.Time(3, run_kernel);
  timer.Time(3, run_copy);
  const int repeats = std::max(1, static_cast<int>(kSampleMs / timer.Time(3, run_kernel)));
  std::vector<float> kernel, copy;
  for (int i = 0; i < kSamples; ++i) {
    kernel.push_back(timer.Time(repeats, run_kernel));
    copy.push_back(timer.Time(repeats, run_copy));
  }
  const float kernel_ms = Median(kernel), copy_ms = Median(copy);
  std::printf("%-44s %9.1f us %6.0f GB/s   copy %6.0f GB/s   ratio %.3f\n", benchmark.name.c_str(), kernel_ms * 1e3f,
              bytes / kernel_ms * 1e-6, bytes / copy_ms * 1e-6, copy_ms / kernel_ms);
}

void TimeOperations(const Benchmark& benchmark) {
  constexpr int kRounds = 15;
  constexpr float kRoundMs = 8.0f;  // a round repeats the launch about so long
  Arena arena;
  const Prepared prepared = benchmark.prepare(arena);
  const auto run = [&] { CheckLaunch(prepared.launch()); };
  Timer timer;
  timer.Time(1, run);
  const int repeats = std::max(1, static_cast<int>(kRoundMs / timer.Time(3, run)));
  std::vector<float> ms;
  for (int i = 0; i < kRounds; ++i) ms.push_back(timer.Time(repeats, run));
  std::sort(ms.begin(), ms.end());
  const auto rate = [&](float time) { return benchmark.operations / time * 1e-9; };
  std::printf("%-36s %9.1f us  %6.1f TF/s (%6.1f to %6.1f)  error %.2e\n", benchmark.name.c_str(),
              ms[kRounds / 2] * 1e3, rate(ms[kRounds / 2]), rate(ms.back()), rate(ms.front()), prepared.error());
}

}  // namespace

Arena::~Arena() {
  for (void* chunk : chunks_) CheckCuda(cudaFree(chunk));
}

void* Arena::AllocateBytes(size_t bytes) {
  bytes = (bytes + 255) / 256 * 256;
  if (bytes > left_) {
    const size_t chunk = std::max(bytes, kChunkBytes);
    void* pointer;
    CheckCuda(cudaMalloc(&pointer, chunk));
    chunks_.push_back(pointer);
    next_ = static_cast<uint8_t*>(pointer);
    left_ = chunk;
  }
  uint8_t* const result = next_;
  next_ += bytes;
  left_ -= bytes;
  return result;
}

void* Arena::UploadBytes(const void* data, size_t bytes) {
  void* pointer = AllocateBytes(bytes);
  CheckCuda(cudaMemcpy(pointer, data, bytes, cudaMemcpyHostToDevice));
  return pointer;
}

uint16_t* Arena::Bf16(size_t count) {
  auto* x = Allocate<__nv_bfloat16>(count);
  Fill<<<1024, 256>>>(x, count, arrays_++, MakeBf16());
  return reinterpret_cast<uint16_t*>(x);
}

uint8_t* Arena::Fp8(size_t count) {
  auto* x = Allocate<uint8_t>(count);
  Fill<<<1024, 256>>>(x, count, arrays_++, MakeFp8());
  return x;
}

float* Arena::Scales(size_t count) {
  auto* scales = Allocate<float>(count);
  Fill<<<1024, 256>>>(scales, count, arrays_++, MakeScale());
  return scales;
}

void AddFloats(float* sum, const float* x, size_t count) {
  Add<<<132 * 16, 256>>>(reinterpret_cast<float4*>(sum), reinterpret_cast<const float4*>(x), count / 4);
  CheckCuda(cudaGetLastError());
}

int Bench(const std::vector<std::string>& names) {
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  std::printf("%s\n", device.name);
  const bool is_sm90 = device.major == 9 && device.minor == 0;
  for (const Operation& operation : Operations()) {
    if (operation.needs_sm90 && !is_sm90) continue;
    for (const Benchmark& benchmark : operation.benchmarks()) {
      if (!IsChosen(benchmark.name, names)) continue;
      benchmark.bytes > 0 ? TimeBytes(benchmark) : TimeOperations(benchmark);
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace jax_tsq::harness
