// Rate of the weight gradient, and its error against sums in double precision at random places.

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "harness/commands.h"
#include "harness/cuda_errors.h"
#include "wgrad/wgrad.h"

namespace jax_tsq::harness {
namespace {

constexpr int kRounds = 15;
constexpr float kRoundMs = 8.0f;  // a round repeats the launch about so long
constexpr int kProbes = 4096;

template <class T>
T* Allocate(size_t count) {
  void* pointer;
  CheckCuda(cudaMalloc(&pointer, count * sizeof(T)));
  return static_cast<T*>(pointer);
}

__device__ uint32_t Hash(uint64_t index) {
  uint64_t h = (index + 1) * 0x9E3779B97F4A7C15ull;
  h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>(h >> 32);
}

// Nearly normal numbers, of which about the largest of 128 is 448, as the quantizer makes them.
__global__ void FillValues(uint8_t* values, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    const uint32_t h = Hash(i + (seed << 40));
    const int sum = static_cast<int>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510;
    values[i] = __nv_cvt_float_to_fp8(sum * (448.0f / 400), __NV_SATFINITE, __NV_E4M3);
  }
}

__global__ void FillScales(float* scales, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    scales[i] = (Hash(i + (seed << 40)) % 1000 + 1000) * 1e-6f;
  }
}

// Squares of a result's error and of the result itself at random places.
__global__ void Probe(WgradProblem problem, const int32_t* starts, double2* squares) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t group = Hash(3 * i) % problem.groups;
  const int64_t k = Hash(3 * i + 1) % problem.x_features;
  const int64_t n = Hash(3 * i + 2) % problem.dy_features;
  double sum = 0.0;
  for (int64_t token = starts[group]; token < starts[group + 1]; ++token) {
    __nv_fp8_e4m3 a, b;
    a.__x = problem.x[k * problem.tokens + token];
    b.__x = problem.dy[n * problem.tokens + token];
    sum += double{float{a}} * problem.x_scales[token / kBlock * problem.x_features + k] * float{b} *
           problem.dy_scales[token / kBlock * problem.dy_features + n];
  }
  const int64_t index = (group * problem.x_features + k) * problem.dy_features + n;
  const double got = problem.dw_is_bf16 ? float{static_cast<const __nv_bfloat16*>(problem.dw)[index]}
                                        : static_cast<const float*>(problem.dw)[index];
  squares[i] = make_double2((got - sum) * (got - sum), sum * sum);
}

struct WgradBenchCase {
  std::string name;
  int64_t tokens, x_features, dy_features, groups;
  bool dw_is_bf16;
};

std::vector<WgradBenchCase> WgradBenchCases() {
  struct Size {
    int64_t tokens, x_features, dy_features, groups;
  };
  const Size sizes[] = {
      {16384, 7168, 2048, 8}, {32768, 7168, 2048, 8}, {32768, 4096, 2048, 32}, {65536, 7168, 2048, 64}};
  std::vector<WgradBenchCase> cases;
  for (const Size& s : sizes) {
    for (const bool bf16 : {false, true}) {
      const std::string name = std::to_string(s.tokens) + "x" + std::to_string(s.x_features) + "x" +
                               std::to_string(s.dy_features) + "-E" + std::to_string(s.groups);
      cases.push_back({std::string(bf16 ? "wgrad-bf16-" : "wgrad-f32-") + name, s.tokens, s.x_features, s.dy_features,
                       s.groups, bf16});
    }
  }
  return cases;
}

// Uneven multiples of 128 that add up to the tokens.
std::vector<int32_t> MakeSizes(int64_t tokens, int64_t groups) {
  std::mt19937 random(7);
  std::vector<int32_t> sizes;
  int64_t left = tokens / kBlock;
  for (int64_t i = groups; i > 1; --i) {
    const double mean = static_cast<double>(left) / i;
    const auto blocks = std::min<int64_t>(left, std::lround(mean * (0.5 + random() % 1024 / 1024.0)));
    sizes.push_back(static_cast<int32_t>(blocks * kBlock));
    left -= blocks;
  }
  sizes.push_back(static_cast<int32_t>(left * kBlock));
  return sizes;
}

void RunWgrad(const WgradBenchCase& c) {
  const std::vector<int32_t> sizes = MakeSizes(c.tokens, c.groups);
  std::vector<int32_t> starts(1, 0);
  for (const int32_t size : sizes) starts.push_back(starts.back() + size);
  const size_t results = c.groups * c.x_features * c.dy_features;
  auto* x = Allocate<uint8_t>(c.x_features * c.tokens);
  auto* dy = Allocate<uint8_t>(c.dy_features * c.tokens);
  auto* x_scales = Allocate<float>(c.x_features * c.tokens / kBlock);
  auto* dy_scales = Allocate<float>(c.dy_features * c.tokens / kBlock);
  auto* device_sizes = Allocate<int32_t>(c.groups);
  auto* device_starts = Allocate<int32_t>(c.groups + 1);
  auto* dw = Allocate<float>(results);
  auto* squares = Allocate<double2>(kProbes);
  FillValues<<<1024, 256>>>(x, c.x_features * c.tokens, 1);
  FillValues<<<1024, 256>>>(dy, c.dy_features * c.tokens, 2);
  FillScales<<<1024, 256>>>(x_scales, c.x_features * c.tokens / kBlock, 3);
  FillScales<<<1024, 256>>>(dy_scales, c.dy_features * c.tokens / kBlock, 4);
  CheckCuda(cudaMemcpy(device_sizes, sizes.data(), sizes.size() * sizeof(int32_t), cudaMemcpyHostToDevice));
  CheckCuda(cudaMemcpy(device_starts, starts.data(), starts.size() * sizeof(int32_t), cudaMemcpyHostToDevice));
  CheckCuda(cudaMemset(dw, 0xFF, results * sizeof(float)));
  const WgradProblem problem = {x, x_scales, dy,           dy_scales,     device_sizes, dw, c.dw_is_bf16,
                                1, c.groups, c.x_features, c.dy_features, c.tokens};
  cudaEvent_t start, stop;
  CheckCuda(cudaEventCreate(&start));
  CheckCuda(cudaEventCreate(&stop));
  const auto time = [&](int repeats) {
    CheckCuda(cudaEventRecord(start));
    for (int i = 0; i < repeats; ++i) CheckLaunch(WgradOnCuda(problem, nullptr));
    CheckCuda(cudaEventRecord(stop));
    CheckCuda(cudaEventSynchronize(stop));
    float ms;
    CheckCuda(cudaEventElapsedTime(&ms, start, stop));
    return ms / repeats;
  };
  time(1);
  const int repeats = std::max(1, static_cast<int>(kRoundMs / time(3)));
  std::vector<float> ms;
  for (int i = 0; i < kRounds; ++i) ms.push_back(time(repeats));
  std::sort(ms.begin(), ms.end());

  Probe<<<kProbes / 128, 128>>>(problem, device_starts, squares);
  std::vector<double2> host(kProbes);
  CheckCuda(cudaMemcpy(host.data(), squares, kProbes * sizeof(double2), cudaMemcpyDeviceToHost));
  double error = 0.0, norm = 0.0;
  for (const double2& s : host) {
    error += s.x;
    norm += s.y;
  }
  const double operations = 2.0 * c.tokens * c.x_features * c.dy_features;
  std::printf("%-36s %9.1f us  %6.1f TF/s (%6.1f to %6.1f)  error %.2e\n", c.name.c_str(), ms[kRounds / 2] * 1e3,
              operations / ms[kRounds / 2] * 1e-9, operations / ms.back() * 1e-9, operations / ms.front() * 1e-9,
              std::sqrt(error / norm));
  std::fflush(stdout);
  for (void* pointer :
       std::initializer_list<void*>{x, dy, x_scales, dy_scales, device_sizes, device_starts, dw, squares}) {
    CheckCuda(cudaFree(pointer));
  }
  CheckCuda(cudaEventDestroy(start));
  CheckCuda(cudaEventDestroy(stop));
}

}  // namespace

// Runs the cases whose names begin with one of `names`; all if there are none.
int BenchWgrad(const std::vector<std::string>& names) {
  for (const WgradBenchCase& c : WgradBenchCases()) {
    const auto matches = [&](const std::string& name) { return c.name.compare(0, name.size(), name) == 0; };
    if (names.empty() || std::any_of(names.begin(), names.end(), matches)) RunWgrad(c);
  }
  return 0;
}

}  // namespace jax_tsq::harness
