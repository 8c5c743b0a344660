// The specification, as plainly as it can be written: scalar, slow, and independent of numerics.h.

#ifndef JAX_TSQ_HARNESS_ORACLE_H_
#define JAX_TSQ_HARNESS_ORACLE_H_

#include <cstdint>
#include <vector>

#include "core/input.h"

namespace jax_tsq::harness {

float DecodeBf16(uint16_t bits);
uint16_t EncodeBf16(float value);
float DecodeFp8(uint8_t bits);
uint8_t EncodeFp8(float value);

// Quantizes values that share a scale, and returns the dequantization scale.
float QuantizeTogether(const std::vector<float>& values, bool pow_2_scales, uint8_t* out);

// Quantizes rows [row, row + rows) of x as `stored` tokens of a result in which features are `pitch` apart.
void QuantizeColumns(const Input& input, int64_t row, int64_t rows, int64_t stored, int64_t pitch, uint8_t* out,
                     float* dequant_scales);

// Quantizes the first `rows` rows of one batch where they are, and stores the others as zeros. Scales lie as [blocks of
// features, tokens].
void QuantizeRows(const Input& input, int64_t batch, int64_t rows, uint8_t* values, float* dequant_scales);

// Where a group lies in x, and in a result whose groups are padded to whole blocks.
struct PlacedGroup {
  int64_t first_row, rows;
  int64_t first_padded, padded;
};

// The groups of one batch.
std::vector<PlacedGroup> PlaceGroups(const int32_t* sizes, int64_t groups, int64_t tokens, bool aligned);
// Rows of x that the groups take together: no others may be read.
int64_t RowsTaken(const std::vector<PlacedGroup>& groups);

// A result in which groups start at whole blocks.
struct PaddedResult {
  int64_t padded_tokens;
  bool flat;  // every group of `values` is contiguous
  uint8_t* values;
  float* dequant_scales;
  int32_t* padded_sizes;
};

// Quantizes the groups of all batches along columns.
void QuantizeGroups(const Input& input, const int32_t* sizes, int64_t groups, bool aligned, const PaddedResult& result);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_ORACLE_H_
