// output[m][n] = (sum_k (a[m][k] - zero_point[m]) w[n][k]) scale_a[m] scale_w[n] + bias[n], of INT8 codes, sums in int32.
//
// Equal to quantkit/ops/reference.py: quantized_linear bit for bit. Weights are stored as w + 128, because vpdpbusd multiplies unsigned by signed bytes; what
// that adds to a sum is 128 times the row's sum of codes. Sums wrap in between, which leaves the result right while it fits int32: inner < 131072.

#include "matmul_core.h"

namespace QK_LEVEL {
namespace {

inline int32_t sum_of(const int8_t* x, int64_t count) {
    int32_t sum = 0;
    int64_t k = 0;
#if defined(__AVX2__)
    // vpsadbw adds unsigned bytes: the codes + 128.
    const __m256i flip = _mm256_set1_epi8(char(0x80)), zero = _mm256_setzero_si256();
    __m256i sums = zero;
    for (; k + 32 <= count; k += 32)
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k)), flip), zero));
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = int32_t(_mm_extract_epi64(half, 0) + _mm_extract_epi64(half, 1) - 128 * k);
#endif
    for (; k < count; ++k) sum += x[k];
    return sum;
}

struct Int8Operands {
    using Tiles = Int8Tiles;
    using Input = int8_t;
    static constexpr bool READY = true;
    static constexpr int64_t BYTES = 1;
    static bool folds(const QkMatmul&) { return false; }
    static void load_row(const QkMatmul& m, const int8_t* x, int64_t row, int64_t inner, Tiles::Activation* a, int32_t* corrections) {
        x += row * m.row_stride;
        // A byte's store may change anything, as far as the compiler knows: sizes in variables of their own.
        const int64_t count = m.inner, group = std::min(m.group, count);
        for (int64_t first = 0; first < count; first += group) *corrections++ = 128 * sum_of(x + first, std::min(group, count - first));
        if constexpr (sizeof *a == 1) std::memcpy(a, x, size_t(count));
        else
            for (int64_t k = 0; k < count; ++k) a[k] = x[k];
        std::memset(a + count, 0, size_t(inner - count) * sizeof *a);
    }
};

}  // namespace

bool matmul_int8(const QkMatmul& m, const int8_t* activations, const uint8_t* packed) { return multiply<Int8Operands>(m, activations, packed); }

}  // namespace QK_LEVEL
