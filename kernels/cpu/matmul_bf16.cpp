// output[m][n] = sum_k x[m][k] w[n][k] + bias[n], of bfloat16, sums in float32 and, if asked for, given out so.
//
// Within c K u (|A| |B|) of quantkit/ops/fallback.py: matmul_bf16. Where there are instructions for pairs of bfloat16, they take subnormal operands as zero.

#include "float_operands.h"

namespace QK_LEVEL {

bool matmul_bf16(const QkMatmul& m, const uint16_t* activations, const uint8_t* packed) { return multiply<BFloat16Operands>(m, activations, packed); }

}  // namespace QK_LEVEL
