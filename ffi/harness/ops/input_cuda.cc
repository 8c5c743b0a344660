#include "harness/ops/input_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "core/numerics.h"
#include "harness/cuda_errors.h"
#include "harness/data.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {

namespace {

constexpr int64_t kLargeFeatures = 7168;
constexpr int64_t kLargeBlocks = 2560;
constexpr int64_t kLargeTokens = kLargeBlocks * kBlock;

}  // namespace

LargeInput::LargeInput(Arena& arena) : rows(kBlock * kLargeFeatures) {
  std::mt19937 random(1);
  FillBf16(Data::kNormal, random, kBlock, kLargeFeatures, 0, rows.data());
  block = {InputType::kBf16, rows.data(), nullptr, 1, kBlock, kLargeFeatures, false};
  auto* x = arena.Allocate<uint16_t>(kLargeTokens * kLargeFeatures);
  const size_t block_bytes = rows.size() * sizeof(uint16_t);
  CheckCuda(cudaMemcpy(x, rows.data(), block_bytes, cudaMemcpyDefault));
  for (int64_t done = 1; done < kLargeBlocks; done *= 2) {
    const int64_t more = std::min(done, kLargeBlocks - done);
    CheckCuda(cudaMemcpy(x + done * rows.size(), x, more * block_bytes, cudaMemcpyDefault));
  }
  input = {InputType::kBf16, x, nullptr, 1, kLargeTokens, kLargeFeatures, false};
}

std::string CompareRepeated(const void* got, size_t element, int64_t pitch, const void* expected, int64_t width,
                            int64_t height, int64_t distance) {
  std::vector<uint8_t> bytes(width * height * element);
  for (const int64_t index : {int64_t{0}, kLargeBlocks / 2, kLargeBlocks - 1}) {
    const auto* from = static_cast<const uint8_t*>(got) + index * distance * element;
    CheckCuda(
        cudaMemcpy2D(bytes.data(), width * element, from, pitch * element, width * element, height, cudaMemcpyDefault));
    if (std::memcmp(bytes.data(), expected, bytes.size()) != 0) {
      return "other bytes in token block " + std::to_string(index);
    }
  }
  return "";
}

std::string CheckLargeColumns(
    const std::function<const char*(const Input& input, uint8_t* out, float* dequant_scales, Arena& arena)>& launch) {
  Arena arena;
  const LargeInput large(arena);
  const int64_t features = kLargeFeatures;
  std::vector<uint8_t> expected(features * kBlock);
  std::vector<float> expected_scales(features);
  QuantizeColumns(large.block, 0, kBlock, kBlock, kBlock, expected.data(), expected_scales.data());
  auto* out = arena.Allocate<uint8_t>(kLargeTokens * features);
  auto* dequant_scales = arena.Allocate<float>(kLargeBlocks * features);
  if (const char* error = launch(large.input, out, dequant_scales, arena)) return error;
  const std::string difference = CompareRepeated(out, kLargeTokens, expected, kBlock, kBlock);
  if (!difference.empty()) return difference;
  return CompareRepeated(dequant_scales, features, expected_scales, features, features);
}

std::string InputSize::Name(const std::string& kind) const {
  return (type == InputType::kBf16 ? "bf16" : "fp8") + kind + "-" + std::to_string(tokens) + "x" +
         std::to_string(features) + "-E" + std::to_string(experts);
}

std::vector<InputSize> BenchSizes() {
  return {{65536, 7168, 32},  {131072, 7168, 256}, {65536, 2048, 64},
          {32768, 4096, 128}, {16384, 7168, 8},    {8192, 2048, 32}};
}

std::vector<InputSize> LayerSizes() { return {{32768, 7168, 8}, {32768, 4096, 32}, {65536, 7168, 64}}; }

std::vector<int32_t> SpreadTokens(int64_t tokens, int64_t experts, int64_t multiple) {
  std::mt19937 random(7);
  std::gamma_distribution<double> share(4.0);
  std::vector<double> shares(experts);
  for (double& s : shares) s = share(random);
  const double units = static_cast<double>(tokens / multiple) / std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<int32_t> counts;
  double end = 0.0;
  int64_t before = 0;
  for (const double s : shares) {
    end += s * units;
    const auto rounded = static_cast<int64_t>(end + 0.5) * multiple;
    counts.push_back(static_cast<int32_t>(rounded - before));
    before = rounded;
  }
  counts.back() += static_cast<int32_t>(tokens - before);
  return counts;
}

Input MakeBenchInput(const InputSize& size, Arena& arena) {
  const bool fp8 = size.type == InputType::kFp8;
  const size_t rows = size.batch * size.tokens;
  Input input = {size.type, nullptr, nullptr, size.batch, size.tokens, size.features, false};
  if (fp8) {
    input.x = arena.Fp8(rows * size.features);
    input.input_scales = arena.Scales(rows * CeilDiv(size.features, kBlock));
  } else {
    input.x = arena.Bf16(rows * size.features);
  }
  return input;
}

double BytesRead(const InputSize& size, int64_t tokens) {
  const bool fp8 = size.type == InputType::kFp8;
  const int64_t row = fp8 ? size.features + 4 * CeilDiv(size.features, kBlock) : 2 * size.features;
  return static_cast<double>(size.batch * tokens * row);
}

}  // namespace jax_tsq::harness
