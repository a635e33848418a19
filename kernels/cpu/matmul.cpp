// The table of one instruction set's multiplications.

#include "matmul.h"

namespace QK_LEVEL {

bool matmul_int8(const QkMatmul&, const int8_t*, const uint8_t*);
bool matmul_fp8(const QkMatmul&, const uint8_t*, const uint8_t*);
bool matmul_weight_only_int8(const QkMatmul&, const uint16_t*, const uint8_t*);
bool matmul_weight_only_e4m3(const QkMatmul&, const uint16_t*, const uint8_t*);
bool matmul_bf16(const QkMatmul&, const uint16_t*, const uint8_t*);
bool score_logits(const QkScores&);

extern const QkMatmulKernels MATMUL_KERNELS;
const QkMatmulKernels MATMUL_KERNELS = {matmul_int8, matmul_fp8, matmul_weight_only_int8, matmul_weight_only_e4m3, matmul_bf16,
                                         score_logits};

}  // namespace QK_LEVEL
