// output[m][n] = (sum_k (a[m][k] - zero_point[m]) w[n][k]) scale_a[m] scale_w[n] + bias[n], of INT8 codes, sums in int32.
//
// Equal to quantkit/ops/reference.py: quantized_linear bit for bit where there is one group. Sums wrap in between, which leaves the result right while it fits int32: inner < 131072.

#include "matmul_decode.h"
#include "matmul_tile.h"
#include "matmul_wgmma.h"

// stream: a cudaStream_t. Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_matmul_int8(const Product* product, void* stream) {
    const Product& p = *product;
    if (!multiply::is_whole(p) || p.inner >= 1 << 17) return -1;
    if (decode::takes(p)) return decode::launch<operands::Int8>(p, stream);
    const hw::Device device = hw::current_device();
    if (device.architecture == 90 && !p.is_grouped()) return wgmma_tile::launch<wgmma_tile::Int8, false>(p, device.multiprocessors, stream);
    return tile::launch<operands::Int8>(p, stream);
}
