// The weight gradient against plain sums in double precision, guards included.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "core/groups.h"
#include "harness/commands.h"
#include "harness/cuda_errors.h"
#include "harness/oracle.h"
#include "wgrad/wgrad.h"

namespace jax_tsq::harness {
namespace {

constexpr size_t kGuard = 256;  // bytes around the result, which keep it aligned

struct WgradCase {
  const char* name;
  int64_t x_features, dy_features, tokens;
  std::vector<int32_t> sizes;  // [batch, groups]
  int64_t batch = 1;
  bool wild_scales = false;
  bool dw_is_bf16 = false;

  int64_t Groups() const { return static_cast<int64_t>(sizes.size()) / batch; }
  int64_t Blocks() const { return tokens / kBlock; }
  size_t Results() const { return sizes.size() * x_features * dy_features; }
  size_t ResultBytes() const { return dw_is_bf16 ? 2 : 4; }
};

std::vector<WgradCase> WgradCases() {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> many(1024, 0);
  for (int i = 0; i < 1024; i += 7) many[i] = 128 * (i % 3);
  const std::vector<WgradCase> cases = {
      {"one block", 192, 128, 128, {128}},
      {"one tile of many blocks", 192, 128, 2048, {2048}},
      {"smallest", 4, 8, 128, {128}},
      {"partial tiles", 260, 200, 1024, {384, 0, 512, 128}},
      {"more columns than rows", 200, 1032, 768, {128, 640}},
      {"tail of no group", 388, 136, 1280, {256, 0, 384}},
      {"nothing but empty groups", 200, 136, 512, {0, 0, 0}},
      {"no tokens", 64, 64, 0, {0, 5, -1}},
      {"no groups", 64, 64, 256, {}},
      {"broken sizes", 196, 136, 1024, {-5, 200, std::numeric_limits<int32_t>::min(), 300, 127, kMost, kMost, 128}},
      {"sizes that overflow", 64, 72, 512, std::vector<int32_t>(300, kMost)},
      {"large and small groups", 196, 136, 128 * 40, {1024, 128, 0, 2048, 256, 1152, 384}},
      {"large groups and a small one", 196, 136, 128 * 45, {1024, 1280, 128, 2048, 1152}},
      {"many groups", 36, 40, 128 * 160, many},
      {"as many tiles as make several lists", 192, 128, 2560, std::vector<int32_t>(1024, 0)},
      {"batches", 260, 72, 640, {128, 512, 0, 256, 256, 256}, 2},
      {"wild scales", 260, 136, 1024, {384, 128, 512}, 1, true},
  };
  std::vector<WgradCase> both;
  for (WgradCase c : cases) {
    both.push_back(c);
    c.dw_is_bf16 = true;
    both.push_back(c);
  }
  return both;
}

struct Operand {
  int64_t features;
  std::vector<uint8_t> values;
  std::vector<float> scales;
};

// First and past the last block of a group, see TakeGroup.
std::pair<int64_t, int64_t> BlocksTaken(const WgradCase& c, int64_t batch, int64_t group) {
  int64_t first = 0, rows = 0;
  for (int64_t i = 0; i <= group; ++i) {
    first += rows;
    rows = TakeGroup(c.sizes[batch * c.Groups() + i], c.tokens - first, true);
  }
  return {first / kBlock, (first + rows) / kBlock};
}

// Blocks of no group hold NaN, which nobody may use.
Operand MakeOperand(const WgradCase& c, int64_t features, std::mt19937& random) {
  Operand operand = {features, std::vector<uint8_t>(c.batch * features * c.tokens, 0x7F),
                     std::vector<float>(c.batch * c.Blocks() * features, NAN)};
  std::normal_distribution<float> normal;
  const float wild[] = {0.0f, 1e-40f, 0x1p127f, 0x1p-120f, 1.0f, 1.0f, INFINITY, NAN};
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    const int64_t used = c.Groups() == 0 ? 0 : BlocksTaken(c, batch, c.Groups() - 1).second;
    for (int64_t block = 0; block < used; ++block) {
      for (int64_t i = 0; i < features; ++i) {
        float& scale = operand.scales[(batch * c.Blocks() + block) * features + i];
        scale = std::ldexp(1.0f + random() % 1024 / 1024.0f, -static_cast<int>(random() % 6));
        // Infinities and NaN in a few rows only, so that there are other results too
        if (c.wild_scales && i % 4 == 0) scale = wild[i % 64 == 0 ? random() % 8 : random() % 6];
        for (int64_t t = 0; t < kBlock; ++t) {
          operand.values[(batch * features + i) * c.tokens + block * kBlock + t] = EncodeFp8(150.0f * normal(random));
        }
      }
    }
  }
  return operand;
}

struct Expected {
  double value;
  double bound;  // of the error, for float32
};

std::vector<Expected> MakeExpected(const WgradCase& c, const Operand& x, const Operand& dy) {
  std::array<double, 256> decoded;
  for (int i = 0; i < 256; ++i) decoded[i] = DecodeFp8(static_cast<uint8_t>(i));
  std::vector<Expected> expected;
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    for (int64_t group = 0; group < c.Groups(); ++group) {
      const auto [first, last] = BlocksTaken(c, batch, group);
      for (int64_t k = 0; k < c.x_features; ++k) {
        for (int64_t n = 0; n < c.dy_features; ++n) {
          Expected e = {0.0, 0.0};
          for (int64_t block = first; block < last; ++block) {
            const float scale = x.scales[(batch * c.Blocks() + block) * c.x_features + k] *
                                dy.scales[(batch * c.Blocks() + block) * c.dy_features + n];
            const uint8_t* a = &x.values[(batch * c.x_features + k) * c.tokens + block * kBlock];
            const uint8_t* b = &dy.values[(batch * c.dy_features + n) * c.tokens + block * kBlock];
            double sum = 0.0, largest = 0.0;
            for (int64_t t = 0; t < kBlock; ++t) {
              const double product = decoded[a[t]] * decoded[b[t]];
              sum += product;
              largest = std::max(largest, std::fabs(product));
            }
            e.value += sum * scale;
            // The tensor cores cut every product off at 2^-13 of the largest.
            e.bound += kBlock * largest * 0x1p-13 * scale;
          }
          expected.push_back(e);
        }
      }
    }
  }
  return expected;
}

class WgradRun {
 public:
  WgradRun(const WgradCase& c, const Operand& x, const Operand& dy) : c_(c) {
    problem_ = {Upload(x.values), Upload(x.scales), Upload(dy.values), Upload(dy.scales), Upload(c.sizes), nullptr,
                c.dw_is_bf16,     c.batch,          c.Groups(),        c.x_features,      c.dy_features,   c.tokens};
    result_ = Upload(std::vector<uint8_t>(c.Results() * c.ResultBytes() + 2 * kGuard, 0xFF));
    problem_.dw = result_ + kGuard;
    CheckCuda(cudaStreamCreate(&stream_));
  }
  ~WgradRun() {
    for (void* pointer : pointers_) cudaFree(pointer);
    cudaStreamDestroy(stream_);
  }
  WgradRun(const WgradRun&) = delete;
  WgradRun& operator=(const WgradRun&) = delete;

  const WgradProblem& problem() const { return problem_; }
  cudaStream_t stream() const { return stream_; }

  void SetSizes(const std::vector<int32_t>& sizes) {
    CheckCuda(cudaMemcpy(const_cast<int32_t*>(problem_.group_sizes), sizes.data(), sizes.size() * sizeof(int32_t),
                         cudaMemcpyHostToDevice));
  }

  // Returns the result and its guards, and overwrites both.
  std::vector<uint8_t> Take() {
    CheckCuda(cudaStreamSynchronize(stream_));
    std::vector<uint8_t> bytes(c_.Results() * c_.ResultBytes() + 2 * kGuard);
    CheckCuda(cudaMemcpy(bytes.data(), result_, bytes.size(), cudaMemcpyDeviceToHost));
    CheckCuda(cudaMemset(result_, 0xFF, bytes.size()));
    return bytes;
  }

 private:
  // Ends where the allocation ends, so that memory checkers see a read past it.
  template <class T>
  T* Upload(const std::vector<T>& data) {
    void* pointer;
    CheckCuda(cudaMalloc(&pointer, std::max<size_t>(data.size() * sizeof(T), 1)));
    CheckCuda(cudaMemcpy(pointer, data.data(), data.size() * sizeof(T), cudaMemcpyHostToDevice));
    pointers_.push_back(pointer);
    return static_cast<T*>(pointer);
  }

  const WgradCase& c_;
  WgradProblem problem_;
  std::vector<void*> pointers_;
  uint8_t* result_;
  cudaStream_t stream_;
};

bool Compare(const WgradCase& c, const char* run, const std::vector<Expected>& expected,
             const std::vector<uint8_t>& got) {
  const auto complain = [&](const char* what, size_t i, double want, double have) {
    std::printf("MISMATCH wgrad '%s' %s %s: %s at %zu of %zu: expected %g, got %g\n", c.name,
                c.dw_is_bf16 ? "bf16" : "f32", run, what, i, expected.size(), want, have);
    return false;
  };
  for (size_t i = 0; i < kGuard; ++i) {
    if (got[i] != 0xFF || got[got.size() - 1 - i] != 0xFF) return complain("guard", i, 0xFF, 0);
  }
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    float value;
    if (c.dw_is_bf16) {
      uint16_t bits;
      std::memcpy(&bits, &got[kGuard + i * 2], sizeof(bits));
      value = DecodeBf16(bits);
    } else {
      std::memcpy(&value, &got[kGuard + i * 4], sizeof(value));
    }
    const auto [want, bound] = expected[i];
    if (!std::isfinite(want) || std::fabs(want) > std::numeric_limits<float>::max()) {
      if (std::isfinite(value)) return complain("not finite", i, want, value);
      continue;
    }
    const double rounding = c.dw_is_bf16 ? std::fabs(want) * 0x1p-8 : 0.0;
    if (!(std::fabs(value - want) <= bound + rounding + 1e-37)) return complain("value", i, want, value);
    error += (value - want) * (value - want);
    norm += want * want;
  }
  const double limit = c.dw_is_bf16 ? 2e-3 : 2e-4;
  if (!c.wild_scales && expected.size() > 1000 && std::sqrt(error) > limit * std::sqrt(norm))
    return complain("norm", 0, norm, error);
  return true;
}

bool CheckWgradCase(WgradCase c) {
  std::mt19937 random(1);
  const Operand x = MakeOperand(c, c.x_features, random);
  const Operand dy = MakeOperand(c, c.dy_features, random);
  WgradRun run(c, x, dy);
  std::vector<uint8_t> first;
  for (const char* time : {"first", "second"}) {
    if (const char* error = WgradOnCuda(run.problem(), run.stream())) {
      std::printf("ERROR wgrad '%s': %s\n", c.name, error);
      return false;
    }
    const std::vector<uint8_t> got = run.Take();
    if (first.empty()) first = got;
    if (got != first) {
      std::printf("MISMATCH wgrad '%s': the second run's bytes differ\n", c.name);
      return false;
    }
    if (!Compare(c, time, MakeExpected(c, x, dy), got)) return false;
  }
  return true;
}

// A graph that was recorded once gives the result of the sizes that memory holds when it runs.
bool CheckGraph() {
  WgradCase c = {"graph", 260, 136, 1280, {0, 1280, 0, 0}};
  std::mt19937 random(1);
  const Operand x = MakeOperand(c, c.x_features, random);
  const Operand dy = MakeOperand(c, c.dy_features, random);
  WgradRun run(c, x, dy);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CheckCuda(cudaStreamBeginCapture(run.stream(), cudaStreamCaptureModeThreadLocal));
  const char* error = WgradOnCuda(run.problem(), run.stream());
  CheckCuda(cudaStreamEndCapture(run.stream(), &graph));
  if (error != nullptr) {
    std::printf("ERROR wgrad in a graph: %s\n", error);
    return false;
  }
  CheckCuda(cudaGraphInstantiate(&executable, graph, 0));
  bool ok = true;
  for (const std::vector<int32_t>& sizes :
       std::vector<std::vector<int32_t>>{{0, 1280, 0, 0}, {128, 256, 512, 384}, {384, 0, 128, 0}, {0, 0, 0, 1280}}) {
    c.sizes = sizes;
    run.SetSizes(sizes);
    CheckCuda(cudaGraphLaunch(executable, run.stream()));
    ok = ok && Compare(c, "replay", MakeExpected(c, x, dy), run.Take());
  }
  CheckCuda(cudaGraphExecDestroy(executable));
  CheckCuda(cudaGraphDestroy(graph));
  return ok;
}

}  // namespace

// Checks the cases whose names begin with one of `names`, and a graph; all if there are none.
int CheckWgrad(const std::vector<std::string>& names) {
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    std::printf("skipped: wgrad, which needs compute capability 9.0\n");
    return 0;
  }
  int checked = 0;
  for (const WgradCase& c : WgradCases()) {
    const auto matches = [&](const std::string& name) {
      return std::string(c.name).compare(0, name.size(), name) == 0;
    };
    if (!names.empty() && std::none_of(names.begin(), names.end(), matches)) continue;
    if (!CheckWgradCase(c)) return 1;
    ++checked;
  }
  if (!CheckGraph()) return 1;
  std::printf("ok: %d cases of wgrad and a graph\n", checked);
  return 0;
}

}  // namespace jax_tsq::harness
