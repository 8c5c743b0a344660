#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "harness/commands.h"
#include "harness/cuda_errors.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {

const char* RunOnCuda(const Case& c, Memory& memory, bool only_readable) {
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto copy = [&](void* to, const void* from, size_t bytes) {
    CheckCuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  };
  Addresses device;
  for (int i = 0; i < kBuffers; ++i) {
    CheckCuda(cudaMalloc(reinterpret_cast<void**>(&device[i]), memory[i].size()));
    const bool input = i == kX || i == kInputScales || i == kGroupSizes;
    if (!only_readable || !input) copy(device[i], memory[i].data(), memory[i].size());
  }
  if (only_readable) {
    for (const Range& range : ReadableRanges(c, memory)) {
      copy(device[range.buffer] + range.offset, memory[range.buffer].data() + range.offset, range.bytes);
    }
  }
  const char* error =
      c.ragged ? RaggedOnCuda(MakeRagged(c, device), stream) : SplitOnCuda(MakeSplit(c, device), stream);
  for (const int i : {kOut, kDequantScales, kPaddedSizes}) copy(memory[i].data(), device[i], memory[i].size());
  CheckCuda(cudaStreamSynchronize(stream));
  for (uint8_t* pointer : device) CheckCuda(cudaFree(pointer));
  CheckCuda(cudaStreamDestroy(stream));
  return error;
}

// More than 2^31 elements. The same 128 rows repeat, so that every token block has the same result.
int CheckLarge() {
  constexpr int64_t kFeatures = 7168;
  constexpr int64_t kBlocks = 2560;
  constexpr int64_t kTokens = kBlocks * kBlock;
  Case c;
  c.name = "large";
  c.data = Data::kNormal;
  c.tokens = kBlock;
  c.features = kFeatures;
  c.tokens_per_expert = {kBlock};
  Memory memory = MakeMemory(c);
  const SplitProblem small = MakeSplit(c, AddressesOf(memory));
  SplitOracle(small);
  const size_t tile_bytes = kBlock * kFeatures * 2;

  uint8_t *x, *out;
  float* dequant_scales;
  int32_t* sizes;
  CheckCuda(cudaMalloc(&x, kBlocks * tile_bytes));
  CheckCuda(cudaMalloc(&out, kTokens * kFeatures));
  CheckCuda(cudaMalloc(&dequant_scales, kBlocks * kFeatures * sizeof(float)));
  CheckCuda(cudaMalloc(&sizes, 2 * sizeof(int32_t)));
  CheckCuda(cudaMemcpy(x, small.input.x, tile_bytes, cudaMemcpyHostToDevice));
  for (int64_t done = 1; done < kBlocks; done *= 2) {
    CheckCuda(cudaMemcpy(x + done * tile_bytes, x, std::min(done, kBlocks - done) * tile_bytes, cudaMemcpyDefault));
  }
  const int32_t size = kTokens;
  CheckCuda(cudaMemcpy(sizes, &size, sizeof(size), cudaMemcpyHostToDevice));

  const auto same = [&](const char* name) {
    std::vector<uint8_t> got(kFeatures * kBlock);
    std::vector<float> scales(kFeatures);
    CheckCuda(cudaDeviceSynchronize());
    for (const int64_t block : {int64_t{0}, kBlocks / 2, kBlocks - 1}) {
      CheckCuda(cudaMemcpy2D(got.data(), kBlock, out + block * kBlock, kTokens, kBlock, kFeatures, cudaMemcpyDefault));
      CheckCuda(cudaMemcpy(scales.data(), dequant_scales + block * kFeatures, kFeatures * sizeof(float),
                           cudaMemcpyDeviceToHost));
      if (std::memcmp(got.data(), small.experts[0].out, got.size()) != 0 ||
          std::memcmp(scales.data(), small.experts[0].dequant_scales, kFeatures * sizeof(float)) != 0) {
        std::printf("MISMATCH large %s, token block %lld\n", name, static_cast<long long>(block));
        return false;
      }
    }
    CheckCuda(cudaMemset(out, 0xFF, kTokens * kFeatures));
    CheckCuda(cudaMemset(dequant_scales, 0xFF, kBlocks * kFeatures * sizeof(float)));
    return true;
  };
  const Input input = {InputType::kBf16, x, nullptr, 1, kTokens, kFeatures, false};
  const char* error = SplitOnCuda({input, {{0, kTokens, out, dequant_scales}}}, nullptr);
  bool ok = error == nullptr && same("split");
  error = RaggedOnCuda({input, sizes, 1, kTokens, true, false, out, dequant_scales, sizes + 1}, nullptr);
  ok = ok && error == nullptr && same("ragged");
  std::printf("%s: large\n", ok ? "ok" : "FAILED");
  return ok ? 0 : 1;
}

}  // namespace jax_tsq::harness
