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

// The same 128 rows repeat, so that every token block has the same result.
std::string CheckLargeInput(
    const std::function<const char*(const Input& input, uint8_t* out, float* dequant_scales, Arena& arena)>& launch) {
  constexpr int64_t kFeatures = 7168;
  constexpr int64_t kBlocks = 2560;
  constexpr int64_t kTokens = kBlocks * kBlock;
  std::vector<uint16_t> rows(kBlock * kFeatures);
  std::mt19937 random(1);
  FillBf16(Data::kNormal, random, kBlock, kFeatures, 0, rows.data());
  std::vector<uint8_t> expected(kFeatures * kBlock);
  std::vector<float> expected_scales(kFeatures);
  const Input block = {InputType::kBf16, rows.data(), nullptr, 1, kBlock, kFeatures, false};
  QuantizeColumns(block, 0, kBlock, kBlock, kBlock, expected.data(), expected_scales.data());

  Arena arena;
  auto* x = arena.Allocate<uint16_t>(kTokens * kFeatures);
  auto* out = arena.Allocate<uint8_t>(kTokens * kFeatures);
  auto* dequant_scales = arena.Allocate<float>(kBlocks * kFeatures);
  const size_t block_bytes = rows.size() * sizeof(uint16_t);
  CheckCuda(cudaMemcpy(x, rows.data(), block_bytes, cudaMemcpyDefault));
  for (int64_t done = 1; done < kBlocks; done *= 2) {
    const int64_t more = std::min(done, kBlocks - done);
    CheckCuda(cudaMemcpy(x + done * rows.size(), x, more * block_bytes, cudaMemcpyDefault));
  }
  CheckCuda(cudaMemset(out, 0xFF, kTokens * kFeatures));
  const Input input = {InputType::kBf16, x, nullptr, 1, kTokens, kFeatures, false};
  if (const char* error = launch(input, out, dequant_scales, arena)) return error;
  CheckCuda(cudaDeviceSynchronize());

  std::vector<uint8_t> got(expected.size());
  std::vector<float> scales(kFeatures);
  for (const int64_t index : {int64_t{0}, kBlocks / 2, kBlocks - 1}) {
    CheckCuda(cudaMemcpy2D(got.data(), kBlock, out + index * kBlock, kTokens, kBlock, kFeatures, cudaMemcpyDefault));
    CheckCuda(
        cudaMemcpy(scales.data(), dequant_scales + index * kFeatures, kFeatures * sizeof(float), cudaMemcpyDefault));
    if (got != expected || scales != expected_scales) return "other bytes in token block " + std::to_string(index);
  }
  return "";
}

std::string InputSize::Name(const std::string& kind) const {
  return (type == InputType::kBf16 ? "bf16" : "fp8") + kind + "-" + std::to_string(tokens) + "x" +
         std::to_string(features) + "-E" + std::to_string(experts);
}

std::vector<InputSize> BenchSizes() {
  return {{65536, 7168, 32},  {131072, 7168, 256}, {65536, 2048, 64},
          {32768, 4096, 128}, {16384, 7168, 8},    {8192, 2048, 32}};
}

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
