// output[m][n] = sum_g( sum_{k in g} a[m][k] w[n][k] ) scale_a[m][g] scale_w[g][n] + bias[n], of E4M3 codes, sums in float32.
//
// Reference: quantkit/ops/reference.py: quantized_linear, within c K u (|A||B|); on Hopper's wgmma a sum of 128 products has fewer bits than float32's.

#include "matmul_decode.h"
#include "matmul_tile.h"
#include "matmul_wgmma.h"

// stream: a cudaStream_t. Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_matmul_fp8(const Product* product, void* stream) {
    const Product& p = *product;
    if (!multiply::is_whole(p) || p.zero_point) return -1;
    if (decode::takes(p)) return decode::launch<operands::E4M3>(p, stream);
    const hw::Device device = hw::current_device();
    if (device.architecture == 90 && wgmma_tile::takes(p)) {
        if (p.is_grouped()) return wgmma_tile::launch<wgmma_tile::E4M3, true>(p, device.multiprocessors, stream);
        return wgmma_tile::launch<wgmma_tile::E4M3, false>(p, device.multiprocessors, stream);
    }
    return tile::launch<operands::E4M3>(p, stream);
}
