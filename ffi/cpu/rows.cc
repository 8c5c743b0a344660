#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/numerics.h"
#include "cpu/convert.h"
#include "cpu/denormals.h"

namespace jax_tsq::cpu {
namespace {

// Rows of a strip, whose scales for one block of features fill a cache line.
constexpr int kStripRows = 16;
// Blocks of features that are read of one row before the next.
constexpr int kPanelBlocks = 64;
constexpr int kPanelFeatures = kPanelBlocks * kBlock;
// Elements that are worth a chunk: about 10 microseconds.
constexpr int64_t kMinElements = 1 << 14;

template <class Level>
JAX_TSQ_INLINE void QuantizeRow(const uint8_t* x, int features, bool pow_2_scales, uint8_t* values,
                                float* dequant_scales) {
  for (int column = 0; column < features; column += kBlock) {
    const int columns = std::min(kBlock, features - column);
    alignas(64) uint8_t full[2 * kBlock];
    alignas(64) uint8_t codes[kBlock];
    const uint8_t* elements = x + 2 * column;
    if (columns < kBlock) {
      std::memset(full, 0, sizeof(full));
      std::memcpy(full, elements, 2 * columns);
      elements = full;
    }
    const Word* words = reinterpret_cast<const Word*>(elements);
    const Amax amax = FindAmax(words, 1);
    const float quant_scale = QuantScale(amax, pow_2_scales);
    *dequant_scales++ = 1.0f / quant_scale;
    ConvertRow<Level>(words, quant_scale, amax.finite, columns < kBlock ? codes : values + column);
    if (columns < kBlock) std::memcpy(values + column, codes, columns);
  }
}

void PortableRow(const uint8_t* x, int features, bool pow_2_scales, uint8_t* values, float* dequant_scales) {
  QuantizeRow<Portable>(x, features, pow_2_scales, values, dequant_scales);
}

#ifdef JAX_TSQ_X86_LEVELS
JAX_TSQ_AVX2 void Avx2Row(const uint8_t* x, int features, bool pow_2_scales, uint8_t* values, float* dequant_scales) {
  QuantizeRow<Fused>(x, features, pow_2_scales, values, dequant_scales);
}
#endif

}  // namespace

RowFunction RowFor([[maybe_unused]] CpuLevel level) noexcept {
#ifdef JAX_TSQ_X86_LEVELS
  if (level != CpuLevel::kPortable) return Avx2Row;
#endif
  return PortableRow;
}

void QuantizeRows(const Input& input, const GroupSizes* groups, const RowResult& result, const Executor& executor,
                  CpuLevel level) {
  const auto source = [&input](int64_t row, int64_t column, int, void*) -> const void* {
    return static_cast<const uint16_t*>(input.x) + row * input.features + column;
  };
  QuantizeRows(input, source, groups, result, executor, level);
}

void QuantizeRows(const Input& input, const RowSource& source, const GroupSizes* groups, const RowResult& result,
                  const Executor& executor, CpuLevel level) {
  const int64_t features = input.features;
  if (input.batch == 0 || input.tokens == 0 || features == 0) return;
  const RowFunction quantize = RowFor(level);
  std::vector<int64_t> rows;  // of each batch that are in groups
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    rows.push_back(groups == nullptr ? input.tokens : RowsInGroups(*groups, batch, input.tokens));
  }
  const int64_t blocks = CeilDiv(features, kBlock);
  const int64_t strips_per_batch = CeilDiv(input.tokens, kStripRows);
  const int64_t strips = input.batch * strips_per_batch;
  const int64_t strips_per_chunk = std::max<int64_t>(1, kMinElements / (kStripRows * features));

  const auto quantize_strip = [&](int64_t strip) {
    const int64_t batch = strip / strips_per_batch;
    const int64_t first_row = strip % strips_per_batch * kStripRows;
    const int stored = static_cast<int>(std::min<int64_t>(kStripRows, input.tokens - first_row));
    const int read = static_cast<int>(std::clamp<int64_t>(rows[batch] - first_row, 0, stored));
    uint8_t* values = result.values + (batch * input.tokens + first_row) * features;
    std::memset(values + read * features, 0, (stored - read) * features);

    for (int64_t block = 0; block < blocks; block += kPanelBlocks) {
      const int64_t column = block * kBlock;
      const int panel_features = static_cast<int>(std::min<int64_t>(kPanelFeatures, features - column));
      float scales[kStripRows][kPanelBlocks];
      for (int row = 0; row < read; ++row) {
        alignas(64) uint8_t scratch[2 * kPanelFeatures];
        const void* x = source(batch * input.tokens + first_row + row, column, panel_features, scratch);
        quantize(static_cast<const uint8_t*>(x), panel_features, input.pow_2_scales, values + row * features + column,
                 scales[row]);
      }
      float* dequant_scales = result.dequant_scales + (batch * blocks + block) * input.tokens + first_row;
      for (int i = 0; i < CeilDiv(panel_features, kBlock); ++i, dequant_scales += input.tokens) {
        for (int row = 0; row < stored; ++row) dequant_scales[row] = row < read ? scales[row][i] : 1.0f;
      }
    }
  };
  executor.Run(CeilDiv(strips, strips_per_chunk), [&](int64_t chunk) {
    const DenormalGuard guard;
    const int64_t end = std::min((chunk + 1) * strips_per_chunk, strips);
    for (int64_t strip = chunk * strips_per_chunk; strip < end; ++strip) quantize_strip(strip);
  });
}

}  // namespace jax_tsq::cpu
