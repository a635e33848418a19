// Codes [output features, input features] in the order in which kernels multiply them: see QkPacking. The same for every instruction set.
// Equal to quantkit/ops/fallback.py: pack_weight.

#include "pack_weight.h"

#include <algorithm>

#include "matmul.h"

namespace {

// element(n, k) of each place of a panel, in order; what lies outside of the matrix is `padding`.
template <class T, int INNER> void pack(const T* codes, int64_t columns, int64_t inner, int64_t row_stride, T padding, T flip, T* packed) {
    const int64_t padded = qk_rounded_up(inner, QK_INNER_UNIT);
    for (int64_t first = 0; first < columns; first += QK_PANEL)
        for (int64_t k = 0; k < padded; k += INNER)
            for (int64_t n = first; n < first + QK_PANEL; ++n)
                for (int64_t i = k; i < k + INNER; ++i) *packed++ = n < columns && i < inner ? T(codes[n * row_stride + i] ^ flip) : padding;
}

}  // namespace

void pack_weight(int packing, const void* codes, int64_t columns, int64_t inner, int64_t row_stride, void* packed) {
    auto bytes = static_cast<const uint8_t*>(codes);
    auto words = static_cast<const uint16_t*>(codes);
    // Flipping the sign bit of a two's complement byte adds 128.
    if (packing == QK_PACKED_INT8_DOT) pack<uint8_t, 4>(bytes, columns, inner, row_stride, 128, 128, static_cast<uint8_t*>(packed));
    else if (packing == QK_PACKED_BFLOAT16) pack<uint16_t, 2>(words, columns, inner, row_stride, 0, 0, static_cast<uint16_t*>(packed));
    else pack<uint8_t, 1>(bytes, columns, inner, row_stride, 0, 0, static_cast<uint8_t*>(packed));
}
