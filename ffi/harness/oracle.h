// The specification, as plainly as it can be written: scalar, slow, and independent of numerics.h.

#ifndef JAX_TSQ_HARNESS_ORACLE_H_
#define JAX_TSQ_HARNESS_ORACLE_H_

#include <cstdint>

#include "ragged/ragged.h"
#include "split/split.h"

namespace jax_tsq::harness {

float DecodeBf16(uint16_t bits);
float DecodeFp8(uint8_t bits);
uint8_t EncodeFp8(float value);

void SplitOracle(const SplitProblem& problem);
void RaggedOracle(const RaggedProblem& problem);

// Rows of x that the groups of a batch take together: no others may be read.
int64_t RowsTaken(const RaggedProblem& problem, int64_t batch);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_ORACLE_H_
