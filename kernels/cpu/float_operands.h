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

// A weight of bfloat16, packed as QK_PACKED_BFLOAT16 says.
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
// 64 codes, 4 of each output feature, to the low and high bytes of bfloat16, which are looked up among the 128 magnitudes.
struct E4M3Bytes {
    __m512i low[2], high[2];
    E4M3Bytes() {
        alignas(64) uint8_t lows[128], highs[128];
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            const float value = code == 127 ? float_of(0x7FC00000u) : exponent ? float_of(uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20) : float(mantissa) * 0x1p-9f;
            lows[code] = uint8_t(bits_of(value) >> 16), highs[code] = uint8_t(bits_of(value) >> 24);
        }
        for (int half = 0; half < 2; ++half) low[half] = _mm512_load_si512(lows + 64 * half), high[half] = _mm512_load_si512(highs + 64 * half);
    }
    static const E4M3Bytes& tables() {
        static const E4M3Bytes made;
        return made;
    }
    inline __m512i lows(__m512i codes) const { return _mm512_permutex2var_epi8(low[0], codes, low[1]); }
    inline __m512i highs(__m512i codes) const {  // with the sign: | (codes & 0x80)
        return _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], codes, high[1]), codes, _mm512_set1_epi8(char(0x80)), 0xF8);
    }
};

// [4 k][16 n] bytes, low and high, to two vectors of pairs [2][16 n][2 k].
struct PairOrder {
    __m512i first, second;
    PairOrder() {
        alignas(64) uint8_t firsts[64], seconds[64];
        for (int n = 0; n < 16; ++n)
            for (int k = 0; k < 2; ++k)
                for (int byte = 0; byte < 2; ++byte) {
                    firsts[4 * n + 2 * k + byte] = uint8_t(16 * k + n + 64 * byte);
                    seconds[4 * n + 2 * k + byte] = uint8_t(16 * (k + 2) + n + 64 * byte);
                }
        first = _mm512_load_si512(firsts), second = _mm512_load_si512(seconds);
    }
};
#endif

// Bytes of weight to ask for in advance: the processor's own prefetching stops at the end of a page.
constexpr int64_t AHEAD = 4096;

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
                static const PairOrder made;
                const PairOrder order = made;
                const E4M3Bytes bytes = E4M3Bytes::tables();
                for (int64_t k = 0; k < count; k += 4) {
                    lanes::prefetch(packed + k * QK_PANEL + AHEAD);
                    const __m512i codes = _mm512_loadu_si512(packed + k * QK_PANEL), lows = bytes.lows(codes), highs = bytes.highs(codes);
                    _mm512_storeu_si512(out + k * QK_PANEL, _mm512_permutex2var_epi8(lows, order.first, highs));
                    _mm512_storeu_si512(out + k * QK_PANEL + 32, _mm512_permutex2var_epi8(lows, order.second, highs));
                }
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
            lanes::prefetch(packed + k * QK_PANEL + AHEAD);
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

// ---- Few rows: codes are decoded where they are multiplied, in float32. (vdpbf16ps takes twice as long for a product as a float32 FMA on Intel's processors.)

// sums[rows][16] (+)= a times one panel of codes.
template <class Codes> struct CodeTiles {
    using Sum = float;
    using Activation = float;
    using Weight = uint8_t;
    static constexpr int ROWS = lanes::WIDTH > 1 ? 4 : 1, PANELS = 1, V = QK_PANEL / lanes::WIDTH;

    template <int ROWS, int PANELS>
    static void tile(const float* a, int64_t row_stride, const uint8_t* b, int64_t, int64_t inner, float* sums, bool add) {
#if defined(__AVX512VBMI__)
        if constexpr (std::is_same_v<Codes, E4M3Weight>) return tile_by_table<ROWS>(a, row_stride, b, inner, sums, add);
#endif
        // Several sums of each output feature: one waits for its last addition.
        constexpr int TURNS = std::max(1, std::min(4, (lanes::WIDTH == 16 ? 16 : 8) / (ROWS * V)));
        lanes::Float sum[ROWS][V][TURNS];
        each<ROWS>([&](auto row) QK_INLINE { each<V>([&](auto v) QK_INLINE { each<TURNS>([&](auto turn) QK_INLINE { sum[row][v][turn] = lanes::broadcast(0.0f); }); }); });
        for (int64_t k = 0; k < inner; k += TURNS) {
            lanes::prefetch(b + k * QK_PANEL + AHEAD);
            each<TURNS>([&](auto turn) QK_INLINE {
                each<V>([&](auto v) QK_INLINE {
                    const lanes::Float weight = Codes::decode(b + (k + turn) * QK_PANEL + v * lanes::WIDTH);
                    each<ROWS>([&](auto row) QK_INLINE {
                        sum[row][v][turn] = lanes::multiply_add(weight, lanes::broadcast(a[row * row_stride + k + turn]), sum[row][v][turn]);
                    });
                });
            });
        }
        each<ROWS>([&](auto row) QK_INLINE {
            each<V>([&](auto v) QK_INLINE {
                each<TURNS - 1>([&](auto turn) QK_INLINE { sum[row][v][0] = lanes::add(sum[row][v][0], sum[row][v][turn + 1]); });
                float* out = sums + row * SUMS_STRIDE + v * lanes::WIDTH;
                lanes::store_float32(out, add ? lanes::add(sum[row][v][0], lanes::load_float32(out)) : sum[row][v][0]);
            });
        });
    }

#if defined(__AVX512VBMI__)
    // Four input features at once, one in each quarter of a vector, which are added up at the end: low and high bytes of bfloat16 side by side make
    // output features 0 to 7 and 8 to 15 of each, and of those the even and the odd ones are float32 after a shift and a mask.
    template <int ROWS> static void tile_by_table(const float* a, int64_t row_stride, const uint8_t* b, int64_t inner, float* sums, bool add) {
        const E4M3Bytes bytes = E4M3Bytes::tables();
        const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), odd = _mm512_set1_epi32(int(0xFFFF0000u));
        __m512 sum[ROWS][4];
        each<ROWS>([&](auto row) QK_INLINE { each<4>([&](auto n) QK_INLINE { sum[row][n] = _mm512_setzero_ps(); }); });
        for (int64_t k = 0; k < inner; k += 4) {
            lanes::prefetch(b + k * QK_PANEL + AHEAD);
            const __m512i codes = _mm512_loadu_si512(b + k * QK_PANEL), lows = bytes.lows(codes), highs = bytes.highs(codes);
            const __m512i left = _mm512_unpacklo_epi8(lows, highs), right = _mm512_unpackhi_epi8(lows, highs);
            const __m512 weight[4] = {_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)), _mm512_castsi512_ps(_mm512_and_si512(left, odd)),
                                      _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), _mm512_castsi512_ps(_mm512_and_si512(right, odd))};
            each<ROWS>([&](auto row) QK_INLINE {
                const __m512 x = _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(a + row * row_stride + k)), quarters);
                each<4>([&](auto n) QK_INLINE { sum[row][n] = _mm512_fmadd_ps(weight[n], x, sum[row][n]); });
            });
        }
        each<ROWS>([&](auto row) QK_INLINE {
            alignas(64) float parts[4][16];
            each<4>([&](auto n) QK_INLINE { _mm512_store_ps(parts[n], sum[row][n]); });
            float* out = sums + row * SUMS_STRIDE;
            for (int n = 0; n < 16; ++n) {
                const float* quarter = parts[n / 8 * 2 + n % 2] + n % 8 / 2;
                const float total = (quarter[0] + quarter[4]) + (quarter[8] + quarter[12]);
                out[n] = add ? out[n] + total : total;
            }
        });
    }
#endif
};

template <class Rows, class Codes> struct CodeOperands {
    using Tiles = CodeTiles<Codes>;
    using Input = typename Rows::Input;
    static constexpr bool READY = true;
    static constexpr int64_t BYTES = Codes::BYTES;
    static bool folds(const QkMatmul&) { return false; }
    static void load_row(const QkMatmul& m, const Input* x, int64_t row, int64_t inner, float* a, int32_t*) {
        Rows::load(m, x, row, a);
        std::memset(a + m.inner, 0, size_t(inner - m.inner) * sizeof *a);
    }
};

template <class Rows, class Codes> bool multiply_codes(const QkMatmul& m, const typename Rows::Input* x, const uint8_t* packed) {
    if (m.rows <= CodeTiles<Codes>::ROWS && !m.powers_of_two) return multiply<CodeOperands<Rows, Codes>>(m, x, packed);
    return multiply<FloatOperands<Rows, Codes>>(m, x, packed);
}

}  // namespace QK_LEVEL
