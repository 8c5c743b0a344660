// Contents of inputs.

#ifndef JAX_TSQ_HARNESS_DATA_H_
#define JAX_TSQ_HARNESS_DATA_H_

#include <cstdint>
#include <random>

namespace jax_tsq::harness {

enum class Data {
  kNormal,
  kWild,   // any bits
  kEdge,   // NaN, infinities, zeros, subnormals and thresholds of the scale, by column and token block
  kPairs,  // in every column a bf16 and some of those that are not larger, of both signs
};

// Of matrices one below the other. `first_column` is for kPairs: its number among all columns of all cases.
void FillBf16(Data data, std::mt19937& random, int64_t rows, int64_t columns, int64_t first_column, uint16_t* x);
void FillFp8(Data data, std::mt19937& random, int64_t elements, uint8_t* x);
float RandomInputScale(Data data, std::mt19937& random);

// Columns of kPairs that together hold every finite bf16 element beside every finite block maximum.
int64_t CountPairColumns();

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_DATA_H_
