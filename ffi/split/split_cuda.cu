// How the tiles of fused_transpose_split_quant map to experts whose token counts the host knows.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/tile/columns.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/shape.cuh"
#include "split/split.h"

namespace jax_tsq::cuda {
namespace {

// Experts that have tokens, passed by value: a pointer table in device memory would need a copy of its own. Blocks find
// their expert by bisecting `first_strip`; a strip is what one block covers of an expert's tokens.
template <int capacity>
struct SplitTable {
  static constexpr uint32_t kCapacity = capacity;
  uint8_t* out[capacity];
  float* dequant_scales[capacity];
  uint32_t first_token[capacity + 1];  // and where the last expert ends
  uint32_t first_strip[capacity];      // UINT32_MAX behind the last expert
  Divisor strips;                      // of all experts
  Divisor column_tiles;                // of a strip
};

// Copying the large table is noticeable in a short launch. What it cannot hold takes further launches.
using FewExperts = SplitTable<64>;
using ManyExperts = SplitTable<1024>;
static_assert(sizeof(ManyExperts) + sizeof(Input) <= 32764, "the limit of kernel parameters");

template <class Table>
__device__ __forceinline__ uint32_t FindExpert(const Table& table, uint32_t strip) {
  uint32_t expert = 0;
#pragma unroll
  for (uint32_t step = Table::kCapacity / 2; step > 0; step /= 2) {
    if (table.first_strip[expert + step] <= strip) expert += step;
  }
  return expert;
}

template <class Access, class Shape, int ctas_per_sm, class Table>
__global__ void __launch_bounds__(Shape::kThreads, MinCtasPerSm(ctas_per_sm, Access::kAligned))
    SplitKernel(const __grid_constant__ Input input, const __grid_constant__ Table table) {
  __shared__ ColumnStorage<Shape> storage;

  // Consecutive blocks walk the features first: whole rows are read, and the output lines that neighbouring strips
  // share meet in L2.
  const uint32_t batch_strip = table.column_tiles.Divide(blockIdx.x);
  const uint32_t first_column = (blockIdx.x - batch_strip * table.column_tiles.value) * Shape::kColumns;
  const uint32_t batch = table.strips.Divide(batch_strip);
  const uint32_t strip = batch_strip - batch * table.strips.value;
  const uint32_t expert = FindExpert(table, strip);
  const uint32_t tokens = table.first_token[expert + 1] - table.first_token[expert];
  const uint32_t token = (strip - table.first_strip[expert]) * Shape::kTokens;

  // Where all experts have whole blocks, the rows are known before the expert is, and their loads start at once.
  TileSource source = {0, Shape::kTokens, first_column, 0, input.batch * input.tokens};
  if constexpr (Shape::kWholeBlocks) {
    static_assert(Shape::kTokenBlocks == 1);
    source.first_row = batch * input.tokens + table.first_token[0] + int64_t{strip} * kBlock;
  } else {
    source.first_row = batch * input.tokens + table.first_token[expert] + token;
    source.rows = static_cast<int>(min(tokens - token, uint32_t{Shape::kTokens}));
  }
  const auto destination = [&]() -> ColumnDestination {
    const int64_t block = int64_t{batch} * ((tokens + kBlock - 1) / kBlock) + token / kBlock;
    return {table.out[expert] + batch * input.features * tokens + token, tokens, source.rows,
            table.dequant_scales[expert] + block * input.features};
  };
  const auto load = [&](int, uint32_t row, uint32_t column, uint32_t (&pairs)[kQuad][kPairs]) {
    LoadPairs<Access>(input, source, row, column, pairs);
  };
  QuantizeColumns<Shape>(load, input, first_column, source.rows, destination, storage);
}

constexpr InputType kBf16 = InputType::kBf16;
constexpr InputType kFp8 = InputType::kFp8;
constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
constexpr int64_t kSmall = int64_t{1} << 24;  // elements that the GPU holds in about two waves of thread blocks

struct Variant {
  InputType type;
  bool rows_aligned;
  int token_multiple;     // what the tokens of every expert are a multiple of
  int64_t most_tokens;    // of an average expert
  int64_t most_elements;  // of x
  int token_blocks;
  int columns;
  int threads;
  void (*few)(Input, FewExperts);
  void (*many)(Input, ManyExperts);
};

template <InputType type, bool rows_aligned, int token_multiple, int token_blocks, int columns, int ctas_per_sm>
constexpr Variant MakeVariant(int64_t most_tokens, int64_t most_elements = kAny) {
  using Access = RowAccess<type, rows_aligned>;
  using Shape = TileShape<token_multiple, token_blocks, columns>;
  return {type,
          rows_aligned,
          token_multiple,
          most_tokens,
          most_elements,
          token_blocks,
          columns,
          Shape::kThreads,
          SplitKernel<Access, Shape, ctas_per_sm, FewExperts>,
          SplitKernel<Access, Shape, ctas_per_sm, ManyExperts>};
}

// The first that fits is taken.
// * Wide tiles read more of a row at once, most of all where rows are unaligned. A small input has too few of them.
// * Features of a very long expert are far apart in memory: two blocks write longer runs there.
// * Unaligned stores are bound by the cache sectors that two thread blocks write in part. Token blocks that leave as
// one
//   run have fewer of them, but in short experts they leave threads idle.
constexpr Variant kVariants[] = {
    MakeVariant<kBf16, true, 128, 1, 64, 8>(kAny, kSmall),
    MakeVariant<kBf16, true, 128, 1, 128, 3>(4096),
    MakeVariant<kBf16, true, 16, 1, 128, 3>(4096),
    MakeVariant<kBf16, true, 16, 2, 128, 2>(kAny),
    MakeVariant<kBf16, true, 1, 1, 64, 6>(96),
    MakeVariant<kBf16, true, 1, 2, 64, 4>(768),
    MakeVariant<kBf16, true, 1, 4, 64, 2>(kAny),
    MakeVariant<kBf16, false, 128, 1, 128, 3>(kAny),
    MakeVariant<kBf16, false, 1, 2, 64, 4>(1024),
    MakeVariant<kBf16, false, 1, 4, 64, 2>(kAny),

    MakeVariant<kFp8, true, 128, 1, 128, 4>(kAny),
    MakeVariant<kFp8, true, 16, 1, 128, 4>(kAny),
    MakeVariant<kFp8, true, 1, 1, 128, 4>(256),
    MakeVariant<kFp8, true, 1, 2, 64, 4>(1024),
    MakeVariant<kFp8, true, 1, 4, 64, 2>(kAny),
    MakeVariant<kFp8, false, 128, 1, 128, 4>(kAny),
    MakeVariant<kFp8, false, 1, 1, 128, 4>(256),
    MakeVariant<kFp8, false, 1, 2, 64, 4>(1024),
    MakeVariant<kFp8, false, 1, 4, 64, 2>(kAny),
};

// The most that a variant may rely on.
int TokenMultiple(const SplitProblem& problem) {
  for (const int multiple : {kBlock, kVectorBytes}) {
    const bool fits = std::all_of(problem.experts.begin(), problem.experts.end(), [&](const Expert& expert) {
      return expert.tokens == 0 || (expert.tokens % multiple == 0 && IsAligned(expert.out, kVectorBytes));
    });
    if (fits) return multiple;
  }
  return 1;
}

const Variant& ChooseVariant(const SplitProblem& problem, int64_t used_experts) {
  const Input& input = problem.input;
  const bool rows_aligned = RowsAligned(input);
  const int multiple = TokenMultiple(problem);
  const int64_t average = input.tokens / used_experts;
  const int64_t elements = input.batch * input.tokens * input.features;
  return *std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.type == input.type && variant.rows_aligned == rows_aligned &&
           multiple % variant.token_multiple == 0 && average <= variant.most_tokens &&
           elements <= variant.most_elements;
  });
}

template <class Table>
const char* Launch(const Variant& variant, void (*kernel)(Input, Table), const Input& input, Table& table,
                   uint32_t experts, int64_t strips, Stream stream) {
  const int64_t column_tiles = CeilDiv(input.features, variant.columns);
  if (strips * column_tiles > kMaxThreadBlocks / input.batch) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  std::fill(table.first_strip + experts, table.first_strip + Table::kCapacity, std::numeric_limits<uint32_t>::max());
  table.strips = Divisor(strips);
  table.column_tiles = Divisor(column_tiles);
  const auto blocks = static_cast<unsigned>(input.batch * strips * column_tiles);
  kernel<<<blocks, variant.threads, 0, stream>>>(input, table);
  return LaunchError();
}

template <class Table>
const char* LaunchAll(const Variant& variant, void (*kernel)(Input, Table), const SplitProblem& problem,
                      Stream stream) {
  const int64_t strip_tokens = int64_t{kBlock} * variant.token_blocks;
  Table table;
  uint32_t experts = 0;
  int64_t strips = 0;
  for (const Expert& expert : problem.experts) {
    if (expert.tokens == 0) continue;
    if (experts == Table::kCapacity) {
      const char* error = Launch(variant, kernel, problem.input, table, experts, strips, stream);
      if (error != nullptr) return error;
      experts = 0;
      strips = 0;
    }
    table.out[experts] = expert.out;
    table.dequant_scales[experts] = expert.dequant_scales;
    table.first_token[experts] = static_cast<uint32_t>(expert.first_token);
    table.first_token[experts + 1] = static_cast<uint32_t>(expert.first_token + expert.tokens);
    table.first_strip[experts] = static_cast<uint32_t>(strips);
    strips += CeilDiv(expert.tokens, strip_tokens);
    ++experts;
  }
  return Launch(variant, kernel, problem.input, table, experts, strips, stream);
}

}  // namespace
}  // namespace jax_tsq::cuda

namespace jax_tsq {

const char* SplitOnCuda(const SplitProblem& problem, Stream stream) {
  const Input& input = problem.input;
  if (input.batch == 0 || input.features == 0) return nullptr;
  if (std::max(input.features, input.tokens) > cuda::kMaxExtent) {
    return "more than 2^31 - 129 features or tokens";
  }
  const int64_t used_experts = std::count_if(problem.experts.begin(), problem.experts.end(),
                                             [](const Expert& expert) { return expert.tokens > 0; });
  if (used_experts == 0) return nullptr;
  const cuda::Variant& variant = cuda::ChooseVariant(problem, used_experts);
  return used_experts <= cuda::FewExperts::kCapacity ? cuda::LaunchAll(variant, variant.few, problem, stream)
                                                     : cuda::LaunchAll(variant, variant.many, problem, stream);
}

}  // namespace jax_tsq
