// scale[b] = store(amax_b(|x|) / largest code);  code[i] = cast(clamp(round(x[i] / scale[b])));  x'[i] = code[i] * scale[b].
//
// A block b is block_rows x block_columns neighbouring elements of a matrix (one row: per channel; part of one row: groups;
// everything: per tensor). Bit for bit equal to quantkit/ops/reference.py: block_amax, choose_scale, quantize, dequantize.
//
// This file is compiled once for each instruction set (lanes.h), into a namespace named QK_LEVEL. A block is read twice, but the second time
// from cache, so each input byte comes from memory once (per tensor: twice).

#include "quantize_blocks.h"

#include "codes.h"
#include "lanes.h"

namespace QK_LEVEL {
namespace {

using lanes::Float;
using lanes::Word;
using lanes::WIDTH;

// ---- Types of values: how one is read and written, and its largest magnitude. As integers, magnitudes have the order of their values, NaN above infinity above
// all numbers: a NaN anywhere makes the amax NaN.

struct NarrowMagnitudes {
    using Stored = uint16_t;
    using Vector = lanes::Narrow;
    static constexpr int VECTOR_WIDTH = lanes::NARROW_WIDTH;
    static inline Vector none() { return lanes::no_narrow(); }
    static inline Vector load(const Stored* x) { return lanes::load_narrow(x, 0x7FFF); }
    static inline Vector larger(Vector a, Vector b) { return lanes::larger_narrow(a, b); }
    static inline Stored largest(Vector x) { return lanes::largest_narrow(x); }
};

struct BFloat16 : NarrowMagnitudes {
    static inline float widen_one(Stored x) { return float_of(uint32_t(x) << 16); }
    static inline Float widen(const Stored* x) { return lanes::load_bfloat16(x); }
    static inline void store(Stored* x, Float value) { lanes::store_bfloat16(x, value); }
    // 2 * WIDTH elements as those at even and those at odd places: cheaper to take apart than halves, and to put together again.
    static constexpr bool INTERLEAVED = true;
    static inline void widen_pair(const Stored* x, Float& even, Float& odd) {
        Word pairs = lanes::load_words(x);
        even = lanes::even_bfloat16(pairs);
        odd = lanes::as_float(lanes::only(pairs, 0xFFFF0000u));
    }
};

struct Float16 : NarrowMagnitudes {
    static inline float widen_one(Stored x) {
        Stored padded[WIDTH] = {x};
        float values[WIDTH];
        lanes::store_float32(values, lanes::load_float16(padded));
        return values[0];
    }
    static inline Float widen(const Stored* x) { return lanes::load_float16(x); }
    static inline void store(Stored* x, Float value) { lanes::store_float16(x, value); }
    static constexpr bool INTERLEAVED = false;
    static inline void widen_pair(const Stored* x, Float& first, Float& second) { first = widen(x), second = widen(x + WIDTH); }
};

struct Float32 {
    using Stored = uint32_t;
    using Vector = Word;
    static constexpr int VECTOR_WIDTH = WIDTH;
    static inline Vector none() { return lanes::broadcast(0u); }
    static inline Vector load(const Stored* x) { return lanes::only(lanes::load_words(x), 0x7FFFFFFFu); }
    static inline Vector larger(Vector a, Vector b) { return lanes::larger(a, b); }
    static inline Stored largest(Vector x) { return lanes::largest(x); }
    static inline float widen_one(Stored x) { return float_of(x); }
    static inline Float widen(const Stored* x) { return lanes::load_float32(x); }
    static constexpr bool INTERLEAVED = false;
    static inline void widen_pair(const Stored* x, Float& first, Float& second) { first = widen(x), second = widen(x + WIDTH); }
    static inline void store(Stored* x, Float value) { lanes::store_float32(x, value); }
};

// ---- Formats: float32 already divided by its scale to codes, and codes to float32. BOUNDED promises quotients that no format has to clamp by
// more than its rounding does: finite, and at most 1/256 beyond the largest code.

struct E4M3 {
    static constexpr float LARGEST = 448.0f;
    // A code in the low byte of each lane. The sign is the dividend's: an improved quotient of -0 is +0.
    template <bool BOUNDED>
    static inline Word encode(Float value, Float dividend) {
        Float magnitude = lanes::as_float(lanes::only(lanes::as_word(value), 0x7FFFFFFFu));
        if (!BOUNDED) magnitude = lanes::smaller(lanes::broadcast(LARGEST), magnitude);  // NaN stays NaN
        // The value lies in an octave [2^e, 2^(e+1)), or among the subnormals, which have the spacing of e = -6. Its codes are 2^(e-3) apart. Adding
        // 2^(e+20), where that is float32's spacing, rounds to the nearest, ties to even, and leaves in the sum's low bits how many spacings
        // there are: 8 to 16, or 0 to 8 among the subnormals. The code is that plus 8 (e + 6). With the octave's exponent field f = e + 127 it
        // is count + 8 f - 968, and -968 is 56 modulo the byte: 56 is put into the addend, whose parity it doesn't change.
        Word octave = lanes::larger(lanes::only(lanes::as_word(magnitude), 0x7F800000u), lanes::broadcast(121u << 23));
        Word addend = lanes::add(octave, lanes::broadcast((20u << 23) + 56u));
        Word sum = lanes::as_word(lanes::add(magnitude, lanes::as_float(addend)));
        Word code = lanes::add(sum, lanes::shift_right<20>(octave));
        if (!BOUNDED) code = lanes::choose(lanes::is_nan(magnitude), lanes::broadcast(0x7Fu), code);
        return lanes::select_bits(0x80u, lanes::shift_right<24>(lanes::as_word(dividend)), code);
    }
    template <bool BOUNDED>
    static inline void store(uint8_t* codes, Float value, Float dividend) {
        lanes::store_low_bytes(codes, encode<BOUNDED>(value, dividend));
    }
    template <bool BOUNDED>
    static inline void store_interleaved(uint8_t* codes, Float even, Float even_dividend, Float odd, Float odd_dividend) {
        lanes::store_low_bytes(codes, encode<BOUNDED>(even, even_dividend), encode<BOUNDED>(odd, odd_dividend));
    }
    static inline Float decode(const uint8_t* codes) { return decode_e4m3(codes); }
};

struct Int8 {
    static constexpr float LARGEST = 127.0f;
    template <bool BOUNDED>
    static inline Word encode(Float value) {
        // Clamping before rounding gives the same integers, because the limits are integers. 128 is left to the saturating store.
        if (!BOUNDED) value = lanes::smaller(lanes::larger(value, lanes::broadcast(-128.0f)), lanes::broadcast(127.0f));
        return lanes::nearest(value);
    }
    template <bool BOUNDED>
    static inline void store(uint8_t* codes, Float value, Float) {
        lanes::store_saturated(codes, encode<BOUNDED>(value));
    }
    template <bool BOUNDED>
    static inline void store_interleaved(uint8_t* codes, Float even, Float, Float odd, Float) {
        lanes::store_saturated(codes, encode<BOUNDED>(even), encode<BOUNDED>(odd));
    }
    static inline Float decode(const uint8_t* codes) { return decode_int8(codes); }
};

// ---- One scale.

inline float round_to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > INFINITY_BITS) return value;
    return float_of((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

inline float power_of_two_scale(float amax, float largest) {
    uint32_t bits = bits_of(amax);
    if (bits == 0) return 1.0f;
    if (bits >= INFINITY_BITS) return amax;
    // amax = m 2^e and largest = M 2^E, with m and M in [0.5, 1); the least power of two that fits is 2^(e - E), or twice that if m > M.
    // A subnormal amax lands below the clamp whatever its exponent is.
    int exponent = int(bits >> 23) - int(bits_of(largest) >> 23) + ((bits & 0x7FFFFFu) > (bits_of(largest) & 0x7FFFFFu));
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return float_of(exponent == -127 ? 0x00400000u : uint32_t(exponent + 127) << 23);
}

template <class Format>
inline float choose_scale(float amax, int rule) {
    if (rule == QK_POWER_OF_TWO) return power_of_two_scale(amax, Format::LARGEST);
    float scale = amax / Format::LARGEST;
    if (rule == QK_DYNAMIC) {
        const float floor = Format::LARGEST == 127.0f ? 0x1p-23f : 1.0f / (448.0f * 512.0f);
        return scale < floor ? floor : scale;
    }
    if (amax == 0.0f) return 1.0f;
    float stored = round_to_bfloat16(scale);
    return stored < 0x1p-126f ? 0x1p-126f : stored;  // the smallest normal: dividing by less can overflow
}

// ---- Division by one scale, correctly rounded.

struct Divide {
    static constexpr bool BOUNDED = false;
    Float scale;
    Divide(float s, float) : scale(lanes::broadcast(s)) {}
    inline Float operator()(Float x) const { return lanes::divide(x, scale); }
};

#if defined(__FMA__) || defined(__AVX512F__)
#define QK_FUSED_MULTIPLY_ADD 1

// x r with r = 1/s, and unless s is a power of two, where that is exact, improved by its remainder, which a fused multiply-add finds exactly. The
// division instruction takes five times as long. The result is the correctly rounded quotient (Markstein 1990, "Computation of elementary
// functions on the IBM RISC System/6000 processor"): it could only differ where x / s lies next to a point B halfway between two floats. With u
// their distance, and s = m 2^k, 1 <= m < 2: r is off by at most m 2^-25 of its size, so x r is less than u from x / s and rounds to one of the
// two floats beside B; the improved value, before its last rounding, is at most u/2 * m 2^-25 from x / s; and x / s, a quotient of 24-bit
// numbers, is at least u 2^-24 / m from B. The first of these is m^2 / 4 < 1 times the second.
//
// The remainder must not underflow. With s within 2^-60 .. 2^60, an x so small that it would has a quotient below 2^-40, which is code zero
// whatever its last bit is. A quotient from 2^20 up, infinite or NaN must not be improved, if there can be any: infinity less infinity is NaN.
template <bool IS_POWER_OF_TWO, bool IS_BOUNDED>
struct Multiply {
    static constexpr bool BOUNDED = IS_BOUNDED;
    Float scale, reciprocal;
    Multiply(float s, float r) : scale(lanes::broadcast(s)), reciprocal(lanes::broadcast(r)) {}
    inline Float operator()(Float x) const {
        Float product = lanes::multiply(x, reciprocal);
        if (IS_POWER_OF_TWO) return product;
        Float quotient = lanes::multiply_add(lanes::negated_multiply_add(product, scale, x), reciprocal, product);
        if (BOUNDED) return quotient;
        return lanes::choose(lanes::less(lanes::as_float(lanes::only(lanes::as_word(product), 0x7FFFFFFFu)), lanes::broadcast(0x1p20f)), quotient, product);
    }
};
#endif

constexpr int64_t TILE_BLOCKS = 128, TILE_COLUMNS = 2048;

// ---- Runs: neighbouring elements of one row. What is left of a vector at the end goes through a padded copy.

template <class Input>
inline typename Input::Vector run_magnitude(const typename Input::Stored* x, int64_t n, typename Input::Vector largest) {
    int64_t i = 0;
    for (; i + Input::VECTOR_WIDTH <= n; i += Input::VECTOR_WIDTH) largest = Input::larger(largest, Input::load(x + i));
    if (i < n) {
        typename Input::Stored rest[Input::VECTOR_WIDTH] = {};
        std::memcpy(rest, x + i, size_t(n - i) * sizeof *x);
        largest = Input::larger(largest, Input::load(rest));
    }
    return largest;
}

template <class Input, class Format, class Division>
inline void encode_run(const typename Input::Stored* x, int64_t n, const Division& divide, uint8_t* codes) {
    constexpr bool BOUNDED = Division::BOUNDED;
    const int64_t ahead = n > TILE_COLUMNS ? n : TILE_COLUMNS;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        Float first, second;
        Input::widen_pair(x + i, first, second);
        lanes::prefetch(x + i + ahead);  // what the next tile, or the next row, begins with
        if (Input::INTERLEAVED) {
            Format::template store_interleaved<BOUNDED>(codes + i, divide(first), first, divide(second), second);
        } else {
            Format::template store<BOUNDED>(codes + i, divide(first), first);
            Format::template store<BOUNDED>(codes + i + WIDTH, divide(second), second);
        }
    }
    for (; i < n; i += WIDTH) {
        int64_t left = n - i < WIDTH ? n - i : WIDTH;
        typename Input::Stored rest[WIDTH] = {};
        uint8_t rest_codes[WIDTH];
        std::memcpy(rest, x + i, size_t(left) * sizeof *x);
        const Float last = Input::widen(rest);
        Format::template store<BOUNDED>(rest_codes, divide(last), last);
        std::memcpy(codes + i, rest_codes, size_t(left));
    }
}

template <class Output, class Format>
inline void decode_run(const uint8_t* codes, int64_t n, float scale, typename Output::Stored* values) {
    const Float factor = lanes::broadcast(scale);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) Output::store(values + i, lanes::multiply(Format::decode(codes + i), factor));
    if (i < n) {
        uint8_t rest[WIDTH] = {};
        typename Output::Stored rest_values[WIDTH];
        std::memcpy(rest, codes + i, size_t(n - i));
        Output::store(rest_values, lanes::multiply(Format::decode(rest), factor));
        std::memcpy(values + i, rest_values, size_t(n - i) * sizeof *values);
    }
}

// ---- Blocks, in tiles: neighbours in one band of rows, few enough for their scales to be kept aside and for their rows to be read in stretches that
// the hardware's prefetcher follows. A tile's magnitudes and codes are found in two sweeps; the second finds the tile in cache.

struct Tile {
    int64_t row, rows, column, blocks, index;  // index: of its first block's scale
};

template <class Visit>
inline void each_tile(const QkMatrix& m, Visit visit) {
    int64_t across = (m.columns + m.block_columns - 1) / m.block_columns;
    int64_t most = TILE_COLUMNS / m.block_columns;
    most = most < 1 ? 1 : most > TILE_BLOCKS ? TILE_BLOCKS : most;
    for (int64_t row = 0, index = 0; row < m.rows; row += m.block_rows, index += across) {
        int64_t rows = m.rows - row < m.block_rows ? m.rows - row : m.block_rows;
        for (int64_t first = 0; first < across; first += most)
            visit(Tile{row, rows, first * m.block_columns, across - first < most ? across - first : most, index + first});
    }
}

// The columns of a tile's block; the last of a row may be narrower.
inline int64_t block_width(const QkMatrix& m, const Tile& tile, int64_t block) {
    int64_t left = m.columns - tile.column - block * m.block_columns;
    return left < m.block_columns ? left : m.block_columns;
}

template <class Input>
inline void tile_amax(const QkMatrix& m, const typename Input::Stored* x, const Tile& tile, float* amax) {
    typename Input::Vector largest[TILE_BLOCKS];
    for (int64_t block = 0; block < tile.blocks; ++block) largest[block] = Input::none();
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
        for (int64_t block = 0; block < tile.blocks; ++block)
            largest[block] = run_magnitude<Input>(x + row * m.row_stride + tile.column + block * m.block_columns, block_width(m, tile, block), largest[block]);
    for (int64_t block = 0; block < tile.blocks; ++block) amax[block] = Input::widen_one(Input::largest(largest[block]));
}

template <class Input, class Format, class Division>
inline void encode_rows(const QkMatrix& m, const typename Input::Stored* x, const Tile& tile, const float* scales, const float* reciprocals, uint8_t* codes) {
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
        for (int64_t block = 0; block < tile.blocks; ++block) {
            const int64_t column = tile.column + block * m.block_columns;
            const Division divide(scales[block], reciprocals[block]);
            encode_run<Input, Format>(x + row * m.row_stride + column, block_width(m, tile, block), divide, codes + row * m.columns + column);
        }
}

// OWN_SCALE: the scales were chosen from the blocks' amax, so that no quotient lies beyond the format's range.
template <class Input, class Format, bool OWN_SCALE>
inline void encode_tile(const QkMatrix& m, const typename Input::Stored* x, const Tile& tile, const float* scales, uint8_t* codes) {
    float reciprocals[TILE_BLOCKS];
#if QK_FUSED_MULTIPLY_ADD
    bool are_moderate = true, are_powers_of_two = true;
    for (int64_t block = 0; block < tile.blocks; ++block) {
        reciprocals[block] = 1.0f / scales[block];
        are_moderate &= scales[block] >= 0x1p-60f && scales[block] <= 0x1p60f;
        are_powers_of_two &= (bits_of(scales[block]) & 0x7FFFFFu) == 0;
    }
    if (are_moderate && are_powers_of_two) return encode_rows<Input, Format, Multiply<true, OWN_SCALE>>(m, x, tile, scales, reciprocals, codes);
    if (are_moderate) return encode_rows<Input, Format, Multiply<false, OWN_SCALE>>(m, x, tile, scales, reciprocals, codes);
#else
    for (int64_t block = 0; block < tile.blocks; ++block) reciprocals[block] = 0.0f;
#endif
    encode_rows<Input, Format, Divide>(m, x, tile, scales, reciprocals, codes);
}

template <class Input>
void block_amax(const QkMatrix& m, const void* values, float* amax) {
    auto x = static_cast<const typename Input::Stored*>(values);
    each_tile(m, [&](const Tile& tile) { tile_amax<Input>(m, x, tile, amax + tile.index); });
}

template <class Input, class Format>
void encode_blocks(const QkMatrix& m, const void* values, const float* scale, uint8_t* codes) {
    auto x = static_cast<const typename Input::Stored*>(values);
    each_tile(m, [&](const Tile& tile) {
        encode_tile<Input, Format, false>(m, x, tile, scale + tile.index, codes);
    });
}

template <class Input, class Format>
void quantize_blocks(const QkMatrix& m, const void* values, int rule, uint8_t* codes, float* scale) {
    auto x = static_cast<const typename Input::Stored*>(values);
    each_tile(m, [&](const Tile& tile) {
        float* scales = scale + tile.index;
        tile_amax<Input>(m, x, tile, scales);
        for (int64_t block = 0; block < tile.blocks; ++block) scales[block] = choose_scale<Format>(scales[block], rule);
        encode_tile<Input, Format, true>(m, x, tile, scales, codes);
    });
}

template <class Output, class Format>
void dequantize_blocks(const QkMatrix& m, const uint8_t* codes, const float* scale, void* values) {
    auto x = static_cast<typename Output::Stored*>(values);
    each_tile(m, [&](const Tile& tile) {
        for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
            for (int64_t block = 0; block < tile.blocks; ++block) {
                const int64_t column = tile.column + block * m.block_columns;
                decode_run<Output, Format>(codes + row * m.row_stride + column, block_width(m, tile, block), scale[tile.index + block], x + row * m.columns + column);
            }
    });
}

}  // namespace

extern const QkKernels KERNELS;
const QkKernels KERNELS = {
    {block_amax<BFloat16>, block_amax<Float16>, block_amax<Float32>},
    {{encode_blocks<BFloat16, Int8>, encode_blocks<BFloat16, E4M3>},
     {encode_blocks<Float16, Int8>, encode_blocks<Float16, E4M3>},
     {encode_blocks<Float32, Int8>, encode_blocks<Float32, E4M3>}},
    {{quantize_blocks<BFloat16, Int8>, quantize_blocks<BFloat16, E4M3>},
     {quantize_blocks<Float16, Int8>, quantize_blocks<Float16, E4M3>},
     {quantize_blocks<Float32, Int8>, quantize_blocks<Float32, E4M3>}},
    {{dequantize_blocks<BFloat16, Int8>, dequantize_blocks<BFloat16, E4M3>},
     {dequantize_blocks<Float16, Int8>, dequantize_blocks<Float16, E4M3>},
     {dequantize_blocks<Float32, Int8>, dequantize_blocks<Float32, E4M3>}},
};

}  // namespace QK_LEVEL
