#include "cpu/grid.h"

#include <algorithm>
#include <cstring>

#include "core/numerics.h"
#include "cpu/denormals.h"
#include "cpu/prefetch.h"
#include "cpu/store.h"

namespace jax_tsq::cpu {
namespace {

// Bytes of a row that are read in one go, a page: twice the memory bandwidth of what one tile reads of a row. Two times
// as much of all rows of a block, what is read and what is fetched, should fit into the second cache.
constexpr int64_t kPanelBytes = 4096;
// Tiles that are worth a chunk: about 10 microseconds.
constexpr int64_t kMinTiles = 8;
// Chunks for each thread, so that one which starts late finds less to do.
constexpr int64_t kChunksPerThread = 8;

}  // namespace

void FillEmpty(const TokenBlock& block, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) std::memset(block.values + i * block.values_stride, 0, block.tokens);
  std::fill(block.dequant_scales + begin, block.dequant_scales + end, 1.0f);
}

TokenBlock RowsOf(const Input& input, int64_t first_row, int rows) noexcept {
  TokenBlock block = {};
  block.rows = rows;
  if (rows == 0) return block;
  if (input.type == InputType::kBf16) {
    block.x = static_cast<const uint16_t*>(input.x) + first_row * input.features;
  } else {
    block.x = static_cast<const uint8_t*>(input.x) + first_row * input.features;
    block.input_scales = input.input_scales + first_row * CeilDiv(input.features, kBlock);
  }
  return block;
}

void QuantizeBlocks(const Input& input, int64_t blocks, const std::function<TokenBlock(int64_t)>& block_at,
                    const Executor& executor, CpuLevel level) {
  if (blocks == 0 || input.features == 0) return;
  const TileFunction tile = TileFor(level);

  // Chunks: blocks, cut along the columns into panels; or several narrow ones.
  const int64_t threads = executor.NumThreads();
  const int64_t element = input.type == InputType::kBf16 ? 2 : 1;  // bytes
  const int64_t stride = input.features * element;
  const int64_t tiles = CeilDiv(input.features, kTileColumns);
  const int64_t panels = std::clamp<int64_t>(CeilDiv(kChunksPerThread * threads, blocks), CeilDiv(stride, kPanelBytes),
                                             CeilDiv(tiles, kMinTiles));
  const int64_t strip = std::max<int64_t>(1, kMinTiles / tiles);
  const int64_t chunks = CeilDiv(blocks, strip) * panels;
  const auto first_block = [&](int64_t chunk) { return chunk / panels * strip; };
  const auto first_tile = [&](int64_t panel) { return panel * tiles / panels; };
  const bool streaming = blocks * kBlock * input.features > kStreamingBytes;

  executor.Run(chunks, [&](int64_t chunk) {
    const DenormalGuard guard;
    const int64_t end = std::min(first_block(chunk) + strip, blocks);
    TokenBlock block = block_at(first_block(chunk));
    for (int64_t index = first_block(chunk); index < end; ++index) {
      // What comes next: for the last block of a chunk the one that this thread takes if all of them are as fast.
      const int64_t next_chunk = index + 1 < end ? chunk : chunk + threads;
      const int64_t next_index = index + 1 < end ? index + 1 : first_block(next_chunk);
      const TokenBlock next = next_chunk < chunks ? block_at(next_index) : TokenBlock{};
      const int64_t next_column = first_tile(next_chunk % panels) * kTileColumns;
      const int64_t next_end = std::min(first_tile(next_chunk % panels + 1) * kTileColumns, input.features);

      const int64_t begin_tile = first_tile(chunk % panels);
      const int64_t end_tile = first_tile(chunk % panels + 1);
      for (int64_t i = begin_tile; i < end_tile; ++i) {
        if (block.rows == 0) {
          FillEmpty(block, i * kTileColumns, std::min((i + 1) * kTileColumns, input.features));
          continue;
        }
        Prefetch prefetch;
        if (next.rows > 0) {  // else there may be no x
          const int64_t fetched = next.rows * (i - begin_tile) / (end_tile - begin_tile);
          const int64_t rows = next.rows * (i - begin_tile + 1) / (end_tile - begin_tile) - fetched;
          const uint8_t* x = static_cast<const uint8_t*>(next.x) + fetched * stride + next_column * element;
          prefetch = Prefetch(x, stride, static_cast<int>((next_end - next_column) * element), static_cast<int>(rows));
        }
        tile(input, block, i * kTileColumns, prefetch, streaming);
      }
      block = next;
    }
    FinishStores();
  });
}

}  // namespace jax_tsq::cpu
