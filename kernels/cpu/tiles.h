// Register tiles: sums[rows][panels * 16] (+)= activations * one or more panels of packed weights, for one instruction set.
//
// Int8Tiles: sums in int32, which wrap where they overflow; weights are codes + 128 (INT8_DOT). FloatTiles: sums in float32, operands bfloat16
// pairs where there is an instruction for them (vdpbf16ps, tdpbf16ps), else float32.
//
// ROWS, PANELS: the largest tile. row_stride: elements; panel_stride: elements. inner: input features, a multiple of 4 (of 2 for FloatTiles).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lanes.h"
#include "matmul.h"

#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace QK_LEVEL {

constexpr int64_t SUMS_STRIDE = 64;  // columns of a tile's sums, at most 4 panels

template <class T> inline T load_as(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// Call f<n> with the number as a constant: count in 1..MOST.
template <int MOST, class F> inline void with_constant(int count, F f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>());
}

// f(0), f(1), ..., f(COUNT - 1), each with its number as a constant: sums stay in registers only where the compiler knows every index from the start.
#define QK_INLINE __attribute__((always_inline))
template <class F, int... NUMBERS> QK_INLINE inline void each_of([[maybe_unused]] F f, std::integer_sequence<int, NUMBERS...>) { (f(std::integral_constant<int, NUMBERS>()), ...); }
template <int COUNT, class F> QK_INLINE inline void each(F f) { each_of(f, std::make_integer_sequence<int, COUNT>()); }

// ---- INT8.

#if defined(__AVX512VNNI__)

struct Int8Dot {
    using Activation = int8_t;
    using Vector = __m512i;
    static constexpr int VECTORS = 1, ROWS = 8, PANELS = 3;  // vectors in a panel
    static inline Vector broadcast(const Activation* a) { return _mm512_set1_epi32(load_as<int32_t>(a)); }
    static inline Vector load(const void* p) { return _mm512_loadu_si512(p); }
    static inline void store(void* p, Vector x) { _mm512_storeu_si512(p, x); }
    static inline Vector load_sums(const void* p) { return load(p); }
    static inline Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
    static inline Vector zero() { return _mm512_setzero_si512(); }
    // Written in assembly because gcc moves arrays of accumulators to memory and back around the intrinsic.
    static inline void dot(Vector& sum, Vector weight, Vector a) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(a)); }
};

#elif defined(__AVXVNNI__)

struct Int8Dot {
    using Activation = int8_t;
    using Vector = __m256i;
    static constexpr int VECTORS = 2, ROWS = 6, PANELS = 1;
    static inline Vector broadcast(const Activation* a) { return _mm256_set1_epi32(load_as<int32_t>(a)); }
    static inline Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static inline void store(void* p, Vector x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
    static inline Vector load_sums(const void* p) { return load(p); }
    static inline Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
    static inline Vector zero() { return _mm256_setzero_si256(); }
    static inline void dot(Vector& sum, Vector weight, Vector a) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(a)); }
};

#elif defined(__AVX2__)

// vpmaddwd on 16-bit numbers, exact where vpmaddubsw would saturate. A vector of sums holds 4 output features, two partial sums each.
struct Int8Dot {
    using Activation = int16_t;
    using Vector = __m256i;
    static constexpr int VECTORS = 4, ROWS = 2, PANELS = 1;
    static inline Vector broadcast(const Activation* a) { return _mm256_set1_epi64x(load_as<int64_t>(a)); }
    static inline Vector load(const void* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
    static inline void store(void* p, Vector x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
    static inline Vector load_sums(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static inline Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
    static inline Vector zero() { return _mm256_setzero_si256(); }
    static inline void dot(Vector& sum, Vector weight, Vector a) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weight, a)); }
    // Two vectors of sums to 8 output features.
    static inline Vector joined(Vector first, Vector second) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xD8); }
};

#endif

struct Int8Tiles {
    using Sum = int32_t;
    using Weight = uint8_t;
#if defined(__AVX2__)
    using Activation = Int8Dot::Activation;
    static constexpr int ROWS = Int8Dot::ROWS, PANELS = Int8Dot::PANELS;

    template <int ROWS, int PANELS, class Dot = Int8Dot>
    static void tile(const Activation* a, int64_t row_stride, const Weight* b, int64_t panel_stride, int64_t inner, Sum* sums, bool add) {
        constexpr int V = Dot::VECTORS, STEP = 64 / V;
        typename Dot::Vector sum[ROWS][PANELS * V];
        each<ROWS>([&](auto row) QK_INLINE { each<PANELS * V>([&](auto v) QK_INLINE { sum[row][v] = Dot::zero(); }); });
        for (int64_t k = 0; k < inner; k += 4) {
            if constexpr (V > 2) {  // too few registers for all the weights at once
                typename Dot::Vector x[ROWS];
                each<ROWS>([&](auto row) QK_INLINE { x[row] = Dot::broadcast(a + row * row_stride + k); });
                each<V>([&](auto v) QK_INLINE {
                    const typename Dot::Vector weight = Dot::load(b + k * 16 + v * STEP);
                    each<ROWS>([&](auto row) QK_INLINE { Dot::dot(sum[row][v], weight, x[row]); });
                });
            } else {
                typename Dot::Vector weight[PANELS * V];
                each<PANELS * V>([&](auto v) QK_INLINE { weight[v] = Dot::load(b + v / V * panel_stride + k * 16 + v % V * STEP); });
                each<ROWS>([&](auto row) QK_INLINE {
                    const typename Dot::Vector x = Dot::broadcast(a + row * row_stride + k);
                    each<PANELS * V>([&](auto v) QK_INLINE { Dot::dot(sum[row][v], weight[v], x); });
                });
            }
        }
        each<ROWS>([&](auto row) QK_INLINE {
            Sum* out = sums + row * SUMS_STRIDE;
            if constexpr (V > 2) each<V / 2>([&](auto v) QK_INLINE { put(out + v * 8, Dot::joined(sum[row][2 * v], sum[row][2 * v + 1]), add); });
            else each<PANELS * V>([&](auto v) QK_INLINE { put(out + v * (16 / V), sum[row][v], add); });
        });
    }

    static inline void put(Sum* out, Int8Dot::Vector value, bool add) { Int8Dot::store(out, add ? Int8Dot::add(value, Int8Dot::load_sums(out)) : value); }
#else
    using Activation = int8_t;
    static constexpr int ROWS = 1, PANELS = 1;

    template <int, int>
    static void tile(const Activation* a, int64_t, const Weight* b, int64_t, int64_t inner, Sum* sums, bool add) {
        uint32_t sum[QK_PANEL] = {};  // unsigned numbers wrap; signed ones may not
        for (int64_t k = 0; k < inner; k += 4)
            for (int n = 0; n < QK_PANEL; ++n)
                sum[n] += uint32_t(b[k * 16 + n * 4] * a[k] + b[k * 16 + n * 4 + 1] * a[k + 1] + b[k * 16 + n * 4 + 2] * a[k + 2] + b[k * 16 + n * 4 + 3] * a[k + 3]);
        for (int n = 0; n < QK_PANEL; ++n) sums[n] = Sum(sum[n] + (add ? uint32_t(sums[n]) : 0u));
    }
#endif
};

// ---- bfloat16 and float32.

#if defined(__AVX512BF16__)

struct FloatTiles {
    using Sum = float;
    using Activation = uint16_t;
    using Weight = uint16_t;
    static constexpr bool PAIRS = true;
    static constexpr int ROWS = 8, PANELS = 3;

    template <int ROWS, int PANELS>
    static void tile(const Activation* a, int64_t row_stride, const Weight* b, int64_t panel_stride, int64_t inner, Sum* sums, bool add) {
        __m512 sum[ROWS][PANELS];
        each<ROWS>([&](auto row) QK_INLINE {
            each<PANELS>([&](auto panel) QK_INLINE { sum[row][panel] = add ? _mm512_loadu_ps(sums + row * SUMS_STRIDE + panel * 16) : _mm512_setzero_ps(); });
        });
        for (int64_t k = 0; k < inner; k += 2) {
            __m512i weight[PANELS];
            each<PANELS>([&](auto panel) QK_INLINE { weight[panel] = _mm512_loadu_si512(b + panel * panel_stride + k * 16); });
            each<ROWS>([&](auto row) QK_INLINE {
                const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + row * row_stride + k));
                each<PANELS>([&](auto panel) QK_INLINE { asm("vdpbf16ps %2, %1, %0" : "+v"(sum[row][panel]) : "v"(weight[panel]), "v"(x)); });
            });
        }
        each<ROWS>([&](auto row) QK_INLINE {
            each<PANELS>([&](auto panel) QK_INLINE { _mm512_storeu_ps(sums + row * SUMS_STRIDE + panel * 16, sum[row][panel]); });
        });
    }
};

#else

struct FloatTiles {
    using Sum = float;
    using Activation = float;
    using Weight = float;
    static constexpr bool PAIRS = false;
    static constexpr int V = QK_PANEL / lanes::WIDTH;  // vectors in a panel
    static constexpr int ROWS = lanes::WIDTH == 16 ? 8 : lanes::WIDTH == 8 ? 6 : 1, PANELS = lanes::WIDTH == 16 ? 3 : 1;

    template <int ROWS, int PANELS>
    static void tile(const Activation* a, int64_t row_stride, const Weight* b, int64_t panel_stride, int64_t inner, Sum* sums, bool add) {
        lanes::Float sum[ROWS][PANELS * V];
        each<ROWS>([&](auto row) QK_INLINE {
            each<PANELS * V>([&](auto v) QK_INLINE {
                sum[row][v] = add ? lanes::load_float32(sums + row * SUMS_STRIDE + v * lanes::WIDTH) : lanes::broadcast(0.0f);
            });
        });
        for (int64_t k = 0; k < inner; ++k) {
            lanes::Float weight[PANELS * V];
            each<PANELS * V>([&](auto v) QK_INLINE { weight[v] = lanes::load_float32(b + v / V * panel_stride + k * 16 + v % V * lanes::WIDTH); });
            each<ROWS>([&](auto row) QK_INLINE {
                const lanes::Float x = lanes::broadcast(a[row * row_stride + k]);
                each<PANELS * V>([&](auto v) QK_INLINE { sum[row][v] = lanes::multiply_add(weight[v], x, sum[row][v]); });
            });
        }
        each<ROWS>([&](auto row) QK_INLINE {
            each<PANELS * V>([&](auto v) QK_INLINE { lanes::store_float32(sums + row * SUMS_STRIDE + v * lanes::WIDTH, sum[row][v]); });
        });
    }
};

#endif

// ---- Any number of rows and panels up to what one tile of this instruction set takes.

#if defined(__AMX_INT8__)
template <class Tiles> struct AmxOf { using Type = void; };
template <> struct AmxOf<Int8Tiles> { using Type = amx::Int8; };
template <> struct AmxOf<FloatTiles> { using Type = amx::BFloat16; };
using Session = amx::Registers;
constexpr int AMX_FEWEST_ROWS = 5;  // fewer go faster one vector at a time
#else
struct Session {};
#endif

// How many rows the activations are padded to with zeros, and the shape of the tiles for so many rows.
struct TileShape {
    int row_unit, rows, panels;
    bool amx;
};

template <class Tiles> inline TileShape tile_shape(int64_t rows, int64_t group) {
#if defined(__AMX_INT8__)
    if constexpr (!std::is_void_v<typename AmxOf<Tiles>::Type>)
        if (rows >= AMX_FEWEST_ROWS && group % AmxOf<Tiles>::Type::INNER == 0) {
            if (rows <= amx::ROWS) return {amx::ROWS, amx::ROWS, 4, true};
            return {amx::ROWS, 2 * amx::ROWS, 2, true};
        }
#endif
    (void)rows, (void)group;
    return {1, Tiles::ROWS, Tiles::PANELS, false};
}

template <class Tiles>
inline void multiply_tile(const TileShape& shape, int rows, int panels, const typename Tiles::Activation* a, int64_t row_stride, const typename Tiles::Weight* b,
                          int64_t panel_stride, int64_t inner, typename Tiles::Sum* sums, bool add) {
#if defined(__AMX_INT8__)
    using Amx = typename AmxOf<Tiles>::Type;
    if constexpr (!std::is_void_v<Amx>)
        if (shape.amx)
            return Amx::multiply(rows, panels, a, row_stride * int64_t(sizeof *a), b, panel_stride * int64_t(sizeof *b), inner / Amx::INNER, sums, SUMS_STRIDE * 4, add);
#endif
    (void)shape;
    with_constant<Tiles::PANELS>(panels, [&](auto panel_count) {
        with_constant<Tiles::ROWS>(rows, [&](auto row_count) {
            Tiles::template tile<row_count(), panel_count()>(a, row_stride, b, panel_stride, inner, sums, add);
        });
    });
}

}  // namespace QK_LEVEL
