// output[m][n] = sum_g( sum_{k in g} x[m][k] w[n][k] ) scale_w[g][n] + bias[n], of bfloat16 activations and INT8 or E4M3 codes, sums in float32.
//
// Within c K u (|A| |B|) of quantkit/ops/reference.py: quantized_linear with no input_spec.

#include "float_operands.h"

namespace QK_LEVEL {

bool matmul_weight_only_int8(const QkMatmul& m, const uint16_t* activations, const uint8_t* packed) {
    return multiply_codes<BFloat16Rows, Int8Weight>(m, activations, packed);
}

bool matmul_weight_only_e4m3(const QkMatmul& m, const uint16_t* activations, const uint8_t* packed) {
    return multiply_codes<BFloat16Rows, E4M3Weight>(m, activations, packed);
}

}  // namespace QK_LEVEL
