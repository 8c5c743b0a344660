#include "harness/ops/product_cuda.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "core/numerics.h"
#include "harness/cuda_errors.h"
#include "harness/oracle.h"

namespace jax_tsq::harness {
namespace {

template <class T>
std::vector<T> Download(const T* data, int64_t count, int64_t stride = 1) {
  std::vector<T> host(count);
  if (count == 0) return host;
  CheckCuda(cudaMemcpy2D(host.data(), sizeof(T), data, stride * sizeof(T), sizeof(T), count, cudaMemcpyDefault));
  return host;
}

}  // namespace

std::string ProductSize::Name() const {
  return std::to_string(tokens) + "x" + std::to_string(x_features) + "x" + std::to_string(dy_features) + "-E" +
         std::to_string(groups);
}

std::vector<ProductSize> ProductSizes() {
  return {{16384, 7168, 2048, 8}, {32768, 7168, 2048, 8}, {32768, 4096, 2048, 32}, {65536, 7168, 2048, 64}};
}

double RelativeError(const std::function<Element(std::mt19937&)>& element) {
  constexpr int kElements = 1024;
  std::mt19937 random(1);
  double error = 0.0, norm = 0.0;
  for (int i = 0; i < kElements; ++i) {
    const Element e = element(random);
    std::vector<uint8_t> a(e.count), b(e.count);
    CheckCuda(cudaMemcpy(a.data(), e.a, a.size(), cudaMemcpyDefault));
    CheckCuda(cudaMemcpy(b.data(), e.b, b.size(), cudaMemcpyDefault));
    const int64_t blocks = CeilDiv(e.count, kBlock);
    const std::vector<float> a_scales = Download(e.a_scales.first, blocks, e.a_scales.stride);
    const std::vector<float> b_scales = Download(e.b_scales.first, blocks, e.b_scales.stride);
    double sum = 0.0;
    for (int64_t k = 0; k < e.count; ++k) {
      sum += double{DecodeFp8(a[k])} * DecodeFp8(b[k]) * a_scales[k / kBlock] * b_scales[k / kBlock];
    }
    const double got = e.is_bf16 ? DecodeBf16(Download(static_cast<const uint16_t*>(e.result), 1)[0])
                                 : Download(static_cast<const float*>(e.result), 1)[0];
    error += (got - sum) * (got - sum);
    norm += sum * sum;
  }
  return std::sqrt(error / norm);
}

}  // namespace jax_tsq::harness
