// How activations and weights become what FloatTiles multiply: pairs of bfloat16, or float32. Every E4M3 and INT8 code is exact in bfloat16.
#pragma once

#include "codes.h"
#include "matmul_core.h"

namespace QK_LEVEL {

inline lanes::Word bits_of_pair(lanes::Float even, lanes::Float odd) {
    return lanes::either(lanes::shift_right<16>(lanes::as_word(even)), lanes::only(lanes::as_word(odd), 0xFFFF0000u));
}

// `count` numbers that are exact in bfloat16, from f(k): WIDTH of them as float32, of which those past the end are dropped.
template <class Activation, class F> inline void store_activations(Activation* a, int64_t count, F f) {
    for (int64_t k = 0; k < count; k += lanes::WIDTH) {
        const lanes::Float values = f(k);
        constexpr bool PAIRS = sizeof(Activation) == 2;
        if (count - k >= lanes::WIDTH) {
            if constexpr (PAIRS) lanes::store_low_words(a + k, lanes::shift_right<16>(lanes::as_word(values)));
            else lanes::store_float32(a + k, values);
            continue;
        }
        alignas(64) Activation kept[2 * lanes::WIDTH];
        if constexpr (PAIRS) lanes::store_low_words(kept, lanes::shift_right<16>(lanes::as_word(values)));
        else lanes::store_float32(kept, values);
        std::memcpy(a + k, kept, size_t(count - k) * sizeof(Activation));
    }
}

struct BFloat16Rows {
    using Input = uint16_t;
    template <class Activation> static void load(const QkMatmul& m, const uint16_t* x, int64_t row, Activation* a) {
        x += row * m.row_stride;
        if constexpr (sizeof(Activation) == 2) std::memcpy(a, x, size_t(m.inner) * 2);
        else
            for (int64_t k = 0; k < m.inner; ++k) a[k] = float_of(uint32_t(x[k]) << 16);
    }
};

struct E4M3Rows {
    using Input = uint8_t;
    template <class Activation> static void load(const QkMatmul& m, const uint8_t* x, int64_t row, Activation* a) {
        x += row * m.row_stride;
        const float* scales = m.powers_of_two && m.activation_scale ? m.activation_scale + row * m.activation_row_step : nullptr;
        alignas(64) uint8_t padded[64] = {};
        for (int64_t first = 0; first < m.inner; first += m.group) {
            const int64_t count = std::min(m.group, m.inner - first);
            const lanes::Float scale = lanes::broadcast(scales ? scales[first / m.group * m.activation_group_step] : 1.0f);
            store_activations(a + first, count, [&](int64_t k) {
                const uint8_t* codes = x + first + k;
                if (count - k < lanes::WIDTH) std::memcpy(padded, codes, size_t(count - k)), codes = padded;
                return lanes::multiply(decode_e4m3(codes), scale);
            });
        }
    }
};

struct Int8Weight {
    static constexpr int64_t BYTES = 1;
    static inline lanes::Float decode(const uint8_t* codes) { return decode_int8(codes); }
};

struct E4M3Weight {
    static constexpr int64_t BYTES = 1;
    static inline lanes::Float decode(const uint8_t* codes) { return decode_e4m3(codes); }
};

#if defined(__AVX512VBMI__)
// 64 codes, 4 of each output feature, to two vectors of pairs: a bfloat16's low and high byte are looked up among the 128 magnitudes.
struct E4M3Pairs {
    __m512i low[2], high[2], first, second;
    E4M3Pairs() {
        alignas(64) uint8_t lows[128], highs[128], firsts[64], seconds[64];
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            const float value = code == 127 ? float_of(0x7FC00000u) : exponent ? float_of(uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20) : float(mantissa) * 0x1p-9f;
            lows[code] = uint8_t(bits_of(value) >> 16), highs[code] = uint8_t(bits_of(value) >> 24);
        }
        for (int n = 0; n < 16; ++n)
            for (int k = 0; k < 2; ++k)
                for (int byte = 0; byte < 2; ++byte) {
                    firsts[4 * n + 2 * k + byte] = uint8_t(16 * k + n + 64 * byte);
                    seconds[4 * n + 2 * k + byte] = uint8_t(16 * (k + 2) + n + 64 * byte);
                }
        for (int half = 0; half < 2; ++half) low[half] = _mm512_load_si512(lows + 64 * half), high[half] = _mm512_load_si512(highs + 64 * half);
        first = _mm512_load_si512(firsts), second = _mm512_load_si512(seconds);
    }
    inline void decode(const uint8_t* codes, uint16_t* out) const {
        const __m512i code = _mm512_loadu_si512(codes);
        const __m512i lows = _mm512_permutex2var_epi8(low[0], code, low[1]);
        const __m512i highs = _mm512_permutex2var_epi8(high[0], code, high[1]);
        const __m512i with_sign = _mm512_ternarylogic_epi32(highs, code, _mm512_set1_epi8(char(0x80)), 0xF8);  // highs | (code & 0x80)
        _mm512_storeu_si512(out, _mm512_permutex2var_epi8(lows, first, with_sign));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi8(lows, second, with_sign));
    }
};
#endif

template <class Rows, class Codes> struct FloatOperands {
    using Tiles = FloatTiles;
    using Input = typename Rows::Input;
    static constexpr bool READY = false;
    static constexpr int64_t BYTES = Codes::BYTES;
    static bool folds(const QkMatmul& m) { return m.powers_of_two; }
    static void load_row(const QkMatmul& m, const Input* x, int64_t row, int64_t inner, Tiles::Activation* a, int32_t*) {
        Rows::load(m, x, row, a);
        std::memset(a + m.inner, 0, size_t(inner - m.inner) * sizeof *a);
    }
    static void unpack(const QkMatmul& m, const uint8_t* packed, int64_t first, int64_t count, int64_t column, Tiles::Weight* out) {
#if defined(__AVX512VBMI__)
        if constexpr (std::is_same_v<Codes, E4M3Weight> && Tiles::PAIRS)
            if (!m.powers_of_two) {
                static const E4M3Pairs tables;
                const E4M3Pairs pairs = tables;
                for (int64_t k = 0; k < count; k += 4) pairs.decode(packed + k * QK_PANEL, out + k * QK_PANEL);
                return;
            }
#endif
        constexpr int V = QK_PANEL / lanes::WIDTH;
        alignas(64) float scales[QK_PANEL];
        const bool scaled = m.powers_of_two && m.weight_scale;
        const int64_t columns = std::min(QK_PANEL, m.columns - column);
        int64_t group = -1;
        const auto value = [&](int64_t k, int v) {
            lanes::Float x = Codes::decode(packed + k * QK_PANEL + v * lanes::WIDTH);
            return scaled ? lanes::multiply(x, lanes::load_float32(scales + v * lanes::WIDTH)) : x;
        };
        for (int64_t k = 0; k < count; k += 2) {
            if (scaled && (first + k) / m.group != group && first + k < m.inner) {
                group = (first + k) / m.group;
                std::memset(scales, 0, sizeof scales);
                std::memcpy(scales, m.weight_scale + group * m.weight_group_step + column, size_t(columns) * 4);
            }
            for (int v = 0; v < V; ++v) {
                if constexpr (Tiles::PAIRS) {
                    lanes::store_words(out + k * QK_PANEL + v * 2 * lanes::WIDTH, bits_of_pair(value(k, v), value(k + 1, v)));
                } else {
                    lanes::store_float32(out + k * QK_PANEL + v * lanes::WIDTH, value(k, v));
                    lanes::store_float32(out + (k + 1) * QK_PANEL + v * lanes::WIDTH, value(k + 1, v));
                }
            }
        }
    }
};

}  // namespace QK_LEVEL
