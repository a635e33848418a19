// output[m][n] = sum_g( sum_{k in g} a[m][k] w[n][k] ) scale_w[g][n] + bias[n], of bfloat16 activations and INT8 or E4M3 codes, sums in float32.
//
// Reference: quantkit/ops/reference.py: quantized_linear without input_spec, within c K u (|A||B|). Codes become bfloat16 in registers, exactly.

#include "matmul_decode.h"
#include "matmul_tile.h"

namespace {

template <class Operands>
int launch(const Product& p, void* stream) {
    return decode::takes(p) ? decode::launch<Operands>(p, stream) : tile::launch<Operands>(p, stream);
}

}  // namespace

// format: QkFormat, of the weights. stream: a cudaStream_t. Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_matmul_weight_only(const Product* product, int format, void* stream) {
    const Product& p = *product;
    if (!multiply::is_whole(p) || p.zero_point || p.activation_scale || format < 0 || format >= QK_FORMATS) return -1;
    return format == QK_INT8 ? launch<operands::Int8Weight>(p, stream) : launch<operands::E4M3Weight>(p, stream);
}
