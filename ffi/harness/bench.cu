// Time of the kernels beside a device-to-device copy that moves as many bytes, in the same run.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>

#include "core/groups.h"
#include "harness/commands.h"
#include "harness/cuda_errors.h"

namespace jax_tsq::harness {
namespace {

constexpr int kSamples = 21;
constexpr float kSampleMs = 1.0f;             // a sample repeats the launch about so long
constexpr size_t kRotated = size_t{1} << 29;  // bytes that a round touches at least, so that caches do not help

struct BenchCase {
  std::string name;
  bool ragged;
  InputType type;
  int64_t batch, tokens, features, experts;
  int64_t multiple;  // of all counts
  int64_t used;      // tokens that the counts add up to
};

std::vector<BenchCase> BenchCases() {
  struct Size {
    int64_t tokens, features, experts;
  };
  const std::vector<Size> sizes = {{65536, 7168, 32},  {131072, 7168, 256}, {65536, 2048, 64},
                                   {32768, 4096, 128}, {16384, 7168, 8},    {8192, 2048, 32}};
  constexpr InputType kBf16 = InputType::kBf16;
  constexpr InputType kFp8 = InputType::kFp8;
  std::vector<BenchCase> cases;
  const auto add = [&](const std::string& kind, bool ragged, InputType type, Size s, int64_t multiple, int64_t used,
                       int64_t batch = 1) {
    const std::string size = std::to_string(s.tokens) + "x" + std::to_string(s.features);
    cases.push_back({kind + "-" + size + "-E" + std::to_string(s.experts), ragged, type, batch, s.tokens, s.features,
                     s.experts, multiple, used});
  };
  for (const Size& s : sizes) add("split-bf16", false, kBf16, s, kBlock, s.tokens);
  for (const Size& s : sizes) add("split-fp8", false, kFp8, s, kBlock, s.tokens);
  for (const Size& s : sizes) add("split-bf16-random", false, kBf16, s, 1, s.tokens);
  for (const Size& s : sizes) add("split-fp8-random", false, kFp8, s, 1, s.tokens);
  const auto less_7 = [](Size s) { return Size{s.tokens, s.features - 7, s.experts}; };
  for (const Size& s : sizes) add("split-bf16-k7", false, kBf16, less_7(s), kBlock, s.tokens);
  for (const Size& s : sizes) add("split-fp8-k7", false, kFp8, less_7(s), kBlock, s.tokens);
  for (const Size& s : sizes) add("split-bf16-k7-random", false, kBf16, less_7(s), 1, s.tokens);
  for (const Size& s : sizes) add("split-fp8-k7-random", false, kFp8, less_7(s), 1, s.tokens);
  for (const int64_t experts : {1, 16, 256, 1024, 4096}) {
    const Size s = {131072, 4096, experts};
    add("split-bf16-flat", false, kBf16, s, experts > 1024 ? 16 : kBlock, s.tokens);
  }
  add("split-bf16-random", false, kBf16, {131072, 4096, 2048}, 1, 131072);
  add("split-bf16-vmap8", false, kBf16, {8192, 4096, 16}, kBlock, 8192, 8);
  for (const Size& s : sizes) add("ragged-bf16", true, kBf16, s, kBlock, s.tokens);
  for (const Size& s : sizes) add("ragged-bf16-random", true, kBf16, s, 1, s.tokens);
  for (const Size& s : sizes) add("ragged-bf16-quarter", true, kBf16, s, kBlock, s.tokens / 4);
  for (const Size& s : sizes) add("ragged-bf16-quarter-random", true, kBf16, s, 1, s.tokens / 4);
  add("ragged-fp8", true, kFp8, sizes[0], kBlock, sizes[0].tokens);
  add("ragged-bf16-k7", true, kBf16, less_7(sizes[0]), kBlock, sizes[0].tokens);
  add("ragged-bf16-vmap8", true, kBf16, {8192, 4096, 16}, kBlock, 8192, 8);
  return cases;
}

// Uneven multiples of c.multiple that add up to c.used, spread like those of benchmarks/workloads.py.
std::vector<int32_t> MakeCounts(const BenchCase& c) {
  std::mt19937 random(7);
  std::gamma_distribution<double> share(4.0);
  std::vector<double> shares(c.experts);
  for (double& s : shares) s = share(random);
  const double units = static_cast<double>(c.used / c.multiple) / std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<int32_t> counts;
  double end = 0.0;
  int64_t before = 0;
  for (const double s : shares) {
    end += s * units;
    const auto rounded = static_cast<int64_t>(end + 0.5) * c.multiple;
    counts.push_back(static_cast<int32_t>(rounded - before));
    before = rounded;
  }
  counts.back() += static_cast<int32_t>(c.used - before);
  return counts;
}

__device__ uint32_t Hash(uint64_t index) {
  uint64_t h = (index + 1) * 0x9E3779B97F4A7C15ull;
  h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>(h >> 32);
}

// Sums of four uniform numbers, nearly normal.
__global__ void FillBf16(__nv_bfloat16* x, size_t count) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    const uint32_t h = Hash(i);
    const int sum = static_cast<int>((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) - 510;
    x[i] = __float2bfloat16(sum * (1.0f / 148));
  }
}

__global__ void FillFp8(uint8_t* x, size_t count) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    x[i] = static_cast<uint8_t>(Hash(i) % 0x7F | (Hash(i) >> 24 & 0x80));
  }
}

__global__ void FillScales(float* scales, size_t count) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    scales[i] = (Hash(i) % 1000 + 1) * 1e-5f;
  }
}

template <class T>
T* Allocate(size_t count) {
  void* pointer;
  CheckCuda(cudaMalloc(&pointer, std::max<size_t>(count, 1) * sizeof(T)));
  return static_cast<T*>(pointer);
}

// One set of buffers as a launch.
struct Work {
  std::vector<void*> buffers;
  SplitProblem split;
  RaggedProblem ragged;
};

Work MakeWork(const BenchCase& c, const std::vector<int32_t>& counts, int64_t padded) {
  Work work;
  const auto own = [&](auto* pointer) {
    work.buffers.push_back(pointer);
    return pointer;
  };
  const size_t elements = c.batch * c.tokens * c.features;
  Input input = {c.type, nullptr, nullptr, c.batch, c.tokens, c.features, false};
  if (c.type == InputType::kBf16) {
    auto* x = own(Allocate<__nv_bfloat16>(elements));
    FillBf16<<<1024, 256>>>(x, elements);
    input.x = x;
  } else {
    auto* x = own(Allocate<uint8_t>(elements));
    FillFp8<<<1024, 256>>>(x, elements);
    const size_t scales = c.batch * c.tokens * CeilDiv(c.features, kBlock);
    auto* input_scales = own(Allocate<float>(scales));
    FillScales<<<1024, 256>>>(input_scales, scales);
    input.x = x;
    input.input_scales = input_scales;
  }
  if (c.ragged) {
    std::vector<int32_t> sizes;
    for (int64_t batch = 0; batch < c.batch; ++batch) sizes.insert(sizes.end(), counts.begin(), counts.end());
    auto* device_sizes = own(Allocate<int32_t>(sizes.size()));
    CheckCuda(cudaMemcpy(device_sizes, sizes.data(), sizes.size() * sizeof(int32_t), cudaMemcpyHostToDevice));
    work.ragged = {input,
                   device_sizes,
                   c.experts,
                   padded,
                   c.multiple == kBlock,
                   false,
                   own(Allocate<uint8_t>(c.batch * c.features * padded)),
                   own(Allocate<float>(c.batch * padded / kBlock * c.features)),
                   own(Allocate<int32_t>(sizes.size()))};
    return work;
  }
  // XLA aligns every result to 256 bytes or more.
  work.split.input = input;
  size_t bytes = 0;
  const auto reserve = [&](size_t size) {
    const size_t position = bytes;
    bytes += (size + 255) / 256 * 256;
    return position;
  };
  std::vector<std::pair<size_t, size_t>> positions;
  for (const int32_t count : counts) {
    const size_t out = reserve(c.batch * c.features * count);
    positions.emplace_back(out, reserve(c.batch * CeilDiv(count, kBlock) * c.features * sizeof(float)));
  }
  uint8_t* results = own(Allocate<uint8_t>(bytes));
  int64_t token = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    work.split.experts.push_back(
        {token, counts[i], results + positions[i].first, reinterpret_cast<float*>(results + positions[i].second)});
    token += counts[i];
  }
  return work;
}

// Bytes read and written once each.
size_t CountBytes(const BenchCase& c, const std::vector<int32_t>& counts, int64_t padded) {
  const int64_t read = c.used * c.features * (c.type == InputType::kBf16 ? 2 : 1);
  const int64_t input_scales = c.type == InputType::kBf16 ? 0 : c.used * CeilDiv(c.features, kBlock) * 4;
  int64_t blocks = padded / kBlock;
  if (!c.ragged) {
    blocks = 0;
    for (const int32_t count : counts) blocks += CeilDiv(count, kBlock);
  }
  return c.batch * (read + input_scales + (c.ragged ? padded : c.used) * c.features + blocks * c.features * 4);
}

float Median(std::vector<float> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

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

void RunCase(const BenchCase& c) {
  const std::vector<int32_t> counts = MakeCounts(c);
  const int64_t padded = PaddedTokens(c.tokens, c.experts, c.multiple == kBlock);
  const size_t bytes = CountBytes(c, counts, padded);
  std::vector<Work> works(std::max<size_t>(2, kRotated / bytes + 1));
  for (Work& work : works) work = MakeWork(c, counts, padded);
  const size_t half = CeilDiv(bytes / 2, 512) * 512;  // an unaligned copy is slower
  const size_t copies = std::max<size_t>(2, kRotated / bytes + 1);
  auto* copied = Allocate<uint8_t>(2 * half * copies);
  FillFp8<<<1024, 256>>>(copied, 2 * half * copies);

  size_t next_work = 0;
  size_t next_copy = 0;
  const auto run_kernel = [&] {
    const Work& work = works[next_work++ % works.size()];
    CheckLaunch(c.ragged ? RaggedOnCuda(work.ragged, nullptr) : SplitOnCuda(work.split, nullptr));
  };
  const auto run_copy = [&] {
    uint8_t* pair = copied + next_copy++ % copies * 2 * half;
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
  const float kernel_ms = Median(kernel);
  const float copy_ms = Median(copy);
  std::printf("%-44s %9.1f us %6.0f GB/s   copy %6.0f GB/s   ratio %.3f\n", c.name.c_str(), kernel_ms * 1e3f,
              bytes / kernel_ms * 1e-6, bytes / copy_ms * 1e-6, copy_ms / kernel_ms);
  std::fflush(stdout);
  for (const Work& work : works) {
    for (void* buffer : work.buffers) CheckCuda(cudaFree(buffer));
  }
  CheckCuda(cudaFree(copied));
}

}  // namespace

// Runs the cases whose names begin with one of `names`; all if there are none.
int Bench(const std::vector<std::string>& names) {
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  std::printf("%s\n", device.name);
  for (const BenchCase& c : BenchCases()) {
    const auto matches = [&](const std::string& name) { return c.name.compare(0, name.size(), name) == 0; };
    if (names.empty() || std::any_of(names.begin(), names.end(), matches)) RunCase(c);
  }
  return 0;
}

}  // namespace jax_tsq::harness
