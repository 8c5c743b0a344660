// swiglu_backward_quantize on the host: a block of padded tokens after the other, in it a block of features after the
// other, whose do1 and h stay in the second cache.

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/numerics.h"
#include "cpu/denormals.h"
#include "cpu/grid.h"
#include "cpu/groups.h"
#include "cpu/rows.h"
#include "cpu/store.h"
#include "cpu/swiglu.h"
#include "cpu/tile.h"
#include "dswiglu/dswiglu.h"

namespace jax_tsq {
namespace {

using cpu::Bf16Bits;

struct alignas(64) Square {
  uint16_t elements[kBlock][kBlock];

  Bf16Bits* row(int i) { return reinterpret_cast<Bf16Bits*>(elements[i]); }
};

class Backward {
 public:
  Backward(const DswigluProblem& problem, CpuLevel level)
      : p_(problem),
        differentiate_(cpu::SwigluFor(level).backward),
        quantize_row_(cpu::RowFor(level)),
        quantize_tile_(cpu::TileFor(level)),
        streaming_(problem.input.batch * problem.padded_tokens * problem.input.features > cpu::kStreamingBytes) {}

  // One block of the padded result; `index` counts those of all batches.
  void Block(int64_t index, const cpu::PaddedBlock& block) const {
    const int64_t features = p_.input.features, blocks = features / kBlock, tokens = p_.input.tokens;
    const int64_t padded_blocks = p_.padded_tokens / kBlock;
    const int64_t batch = index / padded_blocks, token = index % padded_blocks * kBlock;
    if (block.rows == 0) {
      cpu::FillEmpty(Columns(p_.column_values, p_.column_dequant_scales, 2 * features, batch, token), 0, 2 * features);
      cpu::FillEmpty(Columns(p_.h_values, p_.h_dequant_scales, features, batch, token), 0, features);
      return;
    }
    const int64_t row_in_batch = block.first_row - batch * tokens;
    float* dweights = p_.input.weights == nullptr ? nullptr : p_.dweights + block.first_row;
    if (dweights != nullptr) std::fill_n(dweights, block.rows, 0.0f);
    for (int64_t i = 0; i < blocks; ++i) {
      Square dgate, dup, h;
      const int64_t column = i * kBlock;
      for (int row = 0; row < block.rows; ++row) {
        const int64_t at = block.first_row + row;
        const auto* gate = static_cast<const Bf16Bits*>(p_.input.gate_up) + at * 2 * features + column;
        const auto* dh = static_cast<const Bf16Bits*>(p_.dh) + at * features + column;
        const float weight = p_.input.weights == nullptr ? 1.0f : p_.input.weights[at];
        const float sum =
            differentiate_(gate, gate + features, dh, weight, p_.input.limit, dgate.row(row), dup.row(row), h.row(row));
        if (dweights == nullptr) continue;
        p_.block_sums[(batch * blocks + i) * tokens + row_in_batch + row] = sum;
        dweights[row] = WithOneNan(dweights[row] + sum);
      }
      StoreRows(dgate, block, batch, i);
      StoreRows(dup, block, batch, blocks + i);
      StoreColumns(dgate, block.rows, column,
                   Columns(p_.column_values, p_.column_dequant_scales, 2 * features, batch, token));
      StoreColumns(dup, block.rows, features + column,
                   Columns(p_.column_values, p_.column_dequant_scales, 2 * features, batch, token));
      StoreColumns(h, block.rows, column, Columns(p_.h_values, p_.h_dequant_scales, features, batch, token));
    }
  }

  // Rows [begin, end) of a batch, which are in no group.
  void EmptyRows(int64_t batch, int64_t begin, int64_t end) const {
    const int64_t both = 2 * p_.input.features, tokens = p_.input.tokens;
    const int64_t row = batch * tokens + begin, rows = end - begin;
    if (both > 0) std::memset(p_.row_values + row * both, 0, rows * both);  // else there may be no values
    for (int64_t i = 0; i < both / kBlock; ++i) {
      std::fill_n(p_.row_dequant_scales + (batch * (both / kBlock) + i) * tokens + begin, rows, 1.0f);
    }
    if (p_.input.weights == nullptr) return;
    std::fill_n(p_.dweights + row, rows, 0.0f);
    const int64_t blocks = p_.input.features / kBlock;
    for (int64_t i = 0; i < blocks; ++i) std::fill_n(p_.block_sums + (batch * blocks + i) * tokens + begin, rows, 0.0f);
  }

 private:
  cpu::TokenBlock Columns(uint8_t* values, float* dequant_scales, int64_t features, int64_t batch,
                          int64_t token) const {
    cpu::TokenBlock block = {};
    block.values = values + batch * features * p_.padded_tokens + token;
    block.values_stride = p_.padded_tokens;
    block.tokens = kBlock;
    block.dequant_scales = dequant_scales + (batch * p_.padded_tokens + token) / kBlock * features;
    return block;
  }

  // `feature_block` counts those of do1.
  void StoreRows(Square& x, const cpu::PaddedBlock& block, int64_t batch, int64_t feature_block) const {
    const int64_t both = 2 * p_.input.features, tokens = p_.input.tokens;
    float* dequant_scales = p_.row_dequant_scales + (batch * (both / kBlock) + feature_block) * tokens;
    for (int row = 0; row < block.rows; ++row) {
      const int64_t at = block.first_row + row;
      quantize_row_(reinterpret_cast<const uint8_t*>(x.row(row)), kBlock, p_.input.pow_2_scales,
                    p_.row_values + at * both + feature_block * kBlock, dequant_scales + at - batch * tokens);
    }
  }

  void StoreColumns(const Square& x, int rows, int64_t column, cpu::TokenBlock block) const {
    const Input input = {InputType::kBf16, nullptr, nullptr, 1, kBlock, kBlock, p_.input.pow_2_scales};
    block.x = x.elements;
    block.rows = rows;
    block.values += column * block.values_stride;
    block.dequant_scales += column;
    for (int i = 0; i < kBlock; i += cpu::kTileColumns) quantize_tile_(input, block, i, {}, streaming_);
  }

  const DswigluProblem& p_;
  float (*const differentiate_)(const Bf16Bits*, const Bf16Bits*, const Bf16Bits*, float, float, Bf16Bits*, Bf16Bits*,
                                Bf16Bits*);
  const cpu::RowFunction quantize_row_;
  const cpu::TileFunction quantize_tile_;
  const bool streaming_;
};

}  // namespace

void DswigluOnCpu(const DswigluProblem& p, const Executor& executor, CpuLevel level) {
  const SwigluInput& input = p.input;
  // Empty results, which any number of batches may have.
  if (input.groups == 0 && (input.tokens == 0 || (input.features == 0 && input.weights == nullptr))) return;
  const cpu::GroupSizes groups = {input.group_sizes, input.groups, p.aligned};
  const cpu::PaddedLayout layout(groups, input.batch, input.tokens, p.padded_tokens, p.padded_sizes);
  std::vector<int64_t> rows;  // of each batch that are in groups
  for (int64_t batch = 0; batch < input.batch; ++batch) {
    rows.push_back(cpu::RowsInGroups(groups, batch, input.tokens));
  }
  const Backward backward(p, level);
  // Chunks: blocks of the padded results, then blocks of tokens for the rows that are in none.
  const int64_t blocks = input.batch * (p.padded_tokens / kBlock);
  const int64_t token_blocks = CeilDiv(input.tokens, kBlock);
  executor.Run(blocks + input.batch * token_blocks, [&](int64_t chunk) {
    const cpu::DenormalGuard guard;
    if (chunk < blocks) {
      backward.Block(chunk, layout.At(chunk));
    } else {
      const int64_t batch = (chunk - blocks) / token_blocks;
      const int64_t token = (chunk - blocks) % token_blocks * kBlock;
      const int64_t begin = std::max(token, rows[batch]), end = std::min(token + kBlock, input.tokens);
      if (begin < end) backward.EmptyRows(batch, begin, end);
    }
    cpu::FinishStores();
  });
}

}  // namespace jax_tsq
