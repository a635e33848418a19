// output[m][n] = sum_k x[m][k] w[n][k] + bias[n], of bfloat16, sums in float32 and, if asked for, given out so.
//
// Within c K u (|A| |B|) of a float64 product. Where there are instructions for pairs of bfloat16, they take subnormal operands as zero.

#include "float_operands.h"

namespace QK_LEVEL {
namespace {

struct BFloat16Operands {
    using Tiles = FloatTiles;
    using Input = uint16_t;
    static constexpr bool READY = Tiles::PAIRS;
    static constexpr int64_t BYTES = 2;
    static bool folds(const QkMatmul&) { return false; }
    static void load_row(const QkMatmul& m, const uint16_t* x, int64_t row, int64_t inner, Tiles::Activation* a, int32_t*) {
        BFloat16Rows::load(m, x, row, a);
        std::memset(a + m.inner, 0, size_t(inner - m.inner) * sizeof *a);
    }
    // Pairs [k / 2][16 n][2 k] to float32 [k][16 n].
    static void unpack(const QkMatmul&, const uint8_t* packed, int64_t, int64_t count, int64_t, Tiles::Weight* out) {
        if constexpr (!READY)
            for (int64_t k = 0; k < count; k += 2)
                for (int64_t n = 0; n < QK_PANEL; n += lanes::WIDTH) {
                    const lanes::Word pairs = lanes::load_words(packed + (k * QK_PANEL + n * 2) * BYTES);
                    lanes::store_float32(out + k * QK_PANEL + n, lanes::as_float(lanes::shift_left<16>(pairs)));
                    lanes::store_float32(out + (k + 1) * QK_PANEL + n, lanes::as_float(lanes::only(pairs, 0xFFFF0000u)));
                }
    }
};

}  // namespace

bool matmul_bf16(const QkMatmul& m, const uint16_t* activations, const uint8_t* packed) { return multiply<BFloat16Operands>(m, activations, packed); }

}  // namespace QK_LEVEL
