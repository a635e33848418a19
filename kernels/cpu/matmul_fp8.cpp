// output[m][n] = sum_g( sum_{k in g} a[m][k] w[n][k] ) scale_a[m][g] scale_w[g][n] + bias[n], of E4M3 codes, sums in float32.
//
// Within c K u (|A| |B|) of quantkit/ops/reference.py: quantized_linear. Codes are exact in bfloat16 and so are their products in float32; scales that are
// powers of two (MX) go into the operands, without a loss.

#include "float_operands.h"

namespace QK_LEVEL {

bool matmul_fp8(const QkMatmul& m, const uint8_t* activations, const uint8_t* packed) {
    return multiply_codes<E4M3Rows, E4M3Weight>(m, activations, packed);
}

}  // namespace QK_LEVEL
