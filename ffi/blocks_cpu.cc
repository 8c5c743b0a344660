// How tiles are spread over threads.

#include <algorithm>
#include <cstring>

#include "tile_cpu.h"

namespace jax_tsq {
namespace {

// Blocks whose tiles a chunk does in turn, before it goes on to the next columns: the page of an output column, found
// once, gets as many lines.
constexpr int kStrip = 8;
// Bytes of a row that are fetched in one go, a page: twice the memory bandwidth of what one tile reads of a row. Two
// times as much of all rows of a block, what is read and what is fetched, should fit into the second cache.
constexpr int64_t kPanelBytes = 4096;
// Tiles that are worth a chunk: about 10 microseconds.
constexpr int64_t kMinTiles = 8;
// Chunks for each thread, so that one which starts late finds less to do.
constexpr int64_t kChunksPerThread = 8;
// Output beyond this is written around the caches, which saves reading its lines first: up to half as fast again.
constexpr int64_t kStreamingBytes = int64_t{1} << 20;

void FillEmpty(const TokenBlock& block, int64_t column, int64_t features) {
  const int64_t end = std::min(column + kTileColumns, features);
  for (int64_t i = column; i < end; ++i) std::memset(block.values + i * block.values_stride, 0, block.tokens);
  std::fill(block.dequant_scales + column, block.dequant_scales + end, 1.0f);
}

// Orders streaming stores before whatever tells other threads that the chunk is done.
void FinishStores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

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
                    const Executor& executor, TileFunction tile) {
  if (blocks == 0 || input.features == 0) return;

  // Chunks: strips of blocks, cut along the columns as far as it takes to keep all threads busy.
  const int64_t threads = executor.NumThreads();
  const int64_t strip = std::clamp<int64_t>(blocks / (2 * threads), 1, kStrip);
  const int64_t strips = CeilDiv(blocks, strip);
  const int64_t column_tiles = CeilDiv(input.features, kTileColumns);
  const int64_t most_parts = std::max<int64_t>(1, column_tiles * strip / kMinTiles);
  const int64_t parts = std::clamp<int64_t>(CeilDiv(kChunksPerThread * threads, strips), 1, most_parts);
  const int64_t element = input.type == InputType::kBf16 ? 2 : 1;  // bytes
  const int64_t stride = input.features * element;
  const int64_t panel_columns = kPanelBytes / element;
  const bool streaming = blocks * kBlock * input.features > kStreamingBytes;

  executor.Run(strips * parts, [&](int64_t chunk) {
    const DenormalGuard guard;
    const int64_t first = chunk / parts * strip;
    const int count = static_cast<int>(std::min(strip, blocks - first));
    const int64_t begin = chunk % parts * column_tiles / parts * kTileColumns;
    const int64_t end = std::min((chunk % parts + 1) * column_tiles / parts * kTileColumns, input.features);
    TokenBlock todo[kStrip];
    for (int i = 0; i < count; ++i) todo[i] = block_at(first + i);

    for (int64_t panel = begin; panel < end; panel += panel_columns) {
      const int tiles = static_cast<int>(CeilDiv(std::min(panel_columns, end - panel), kTileColumns));
      for (int i = 0; i < count; ++i) {
        const TokenBlock& block = todo[i];
        const bool wrap = i + 1 == count;
        const int64_t next_panel = panel + (wrap ? panel_columns : 0);
        for (int tile_of_panel = 0; tile_of_panel < tiles; ++tile_of_panel) {
          const int64_t column = panel + tile_of_panel * kTileColumns;
          if (block.rows == 0) {
            FillEmpty(block, column, input.features);
            continue;
          }
          Prefetch prefetch;
          if (const TokenBlock& next = todo[wrap ? 0 : i + 1]; next_panel < end && next.rows > 0) {
            const int first = next.rows * tile_of_panel / tiles;
            const int rows = next.rows * (tile_of_panel + 1) / tiles - first;
            const int64_t row_bytes = std::min(panel_columns, end - next_panel) * element;
            prefetch = Prefetch(static_cast<const uint8_t*>(next.x) + first * stride + next_panel * element, stride,
                                static_cast<int>(row_bytes), rows);
          }
          tile(input, block, column, prefetch, streaming);
        }
      }
    }
    FinishStores();
  });
}

}  // namespace jax_tsq
