// Vectors of float32 for one instruction set, chosen by the compiler's flags: AVX-512, AVX2, or one number at a time.
//
// Each set has the same names, so a kernel is written once. `Float` and `Word` are vectors of WIDTH 32-bit lanes (in AVX2 and AVX-512 a mask is
// what that set compares into); `Narrow` is a vector of NARROW_WIDTH 16-bit lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace QK_LEVEL {

constexpr uint32_t INFINITY_BITS = 0x7F800000u;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

namespace lanes {

#if defined(__AVX512BW__)

constexpr int WIDTH = 16, NARROW_WIDTH = 32;
using Float = __m512;
using Word = __m512i;
using Narrow = __m512i;
using Mask = __mmask16;

inline Float broadcast(float x) { return _mm512_set1_ps(x); }
inline Word broadcast(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline Float as_float(Word x) { return _mm512_castsi512_ps(x); }
inline Word as_word(Float x) { return _mm512_castps_si512(x); }
inline Float load_float32(const void* p) { return _mm512_loadu_ps(p); }
inline Float load_bfloat16(const void* p) { return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16)); }
inline Float even_bfloat16(Word pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
inline Float load_float16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
// E4M3 codes as the float16 numbers of the same bits, which are 2^-8 times as large; all bits of NaN are set.
inline Float load_e4m3_as_float16(const void* p) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))), magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7F));
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F));
    return _mm512_cvtph_ps(_mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(short(0xBFFF))), nan));
}
inline Word load_bytes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Word load_signed_bytes(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline void store_low_bytes(void* p, Word x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
inline void store_saturated(void* p, Word x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }
inline void store_low_bytes(void* p, Word even, Word odd) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(_mm512_mask_mov_epi16(even, 0xAAAAAAAAu, _mm512_slli_epi32(odd, 16))));
}
inline void store_saturated(void* p, Word even, Word odd) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtsepi16_epi8(_mm512_mask_mov_epi16(even, 0xAAAAAAAAu, _mm512_slli_epi32(odd, 16))));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void store_float32(void* p, Float x) { _mm512_storeu_ps(p, x); }
inline void store_low_words(void* p, Word x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
inline void store_float16(void* p, Float x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }           // a b + c
inline Float negated_multiply_add(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// Of two numbers; b where either is NaN.
inline Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
inline Float to_float(Word x) { return _mm512_cvtepi32_ps(x); }
inline Word nearest(Float x) { return _mm512_cvtps_epi32(x); }  // ties to even; only below 2^31
inline Word add(Word a, Word b) { return _mm512_add_epi32(a, b); }
inline Word only(Word a, uint32_t b) { return _mm512_and_si512(a, broadcast(b)); }
inline Word either(Word a, Word b) { return _mm512_or_si512(a, b); }
template <int N> inline Word shift_right(Word x) { return _mm512_srli_epi32(x, N); }
template <int N> inline Word shift_left(Word x) { return _mm512_slli_epi32(x, N); }
inline Word select_bits(uint32_t which, Word yes, Word no) { return _mm512_ternarylogic_epi32(broadcast(which), yes, no, 0xCA); }
inline Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_nan(Float a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline bool any(Mask m) { return m != 0; }
inline Mask equal(Word a, uint32_t b) { return _mm512_cmpeq_epi32_mask(a, broadcast(b)); }
inline Word choose(Mask m, Word yes, Word no) { return _mm512_mask_blend_epi32(m, no, yes); }
inline Float choose(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }

inline Word larger(Word a, Word b) { return _mm512_max_epu32(a, b); }  // unsigned
inline Word smaller(Word a, Word b) { return _mm512_min_epu32(a, b); }
inline Word larger_signed(Word a, Word b) { return _mm512_max_epi32(a, b); }
inline Word subtract(Word a, Word b) { return _mm512_sub_epi32(a, b); }
// Both count 1 more in the lanes where x is at most `limit`, unsigned.
inline Word count_at_most(Word count, Word x, Word limit) { return _mm512_mask_sub_epi32(count, _mm512_cmple_epu32_mask(x, limit), count, _mm512_set1_epi32(-1)); }
inline void store_words(void* p, Word x) { _mm512_storeu_si512(p, x); }
inline Word load_words(const void* p) { return _mm512_loadu_si512(p); }
inline uint32_t largest(Word x) { return _mm512_reduce_max_epu32(x); }
inline float largest(Float x) { return _mm512_reduce_max_ps(x); }
inline float sum(Float x) { return _mm512_reduce_add_ps(x); }
inline Narrow load_narrow(const void* p, uint16_t mask) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(short(mask))); }
inline Narrow broadcast_narrow(uint16_t x) { return _mm512_set1_epi16(short(x)); }
inline Narrow only_narrow(Narrow a, uint16_t b) { return _mm512_and_si512(a, broadcast_narrow(b)); }
inline Narrow smaller_narrow(Narrow a, Narrow b) { return _mm512_min_epu16(a, b); }
inline Narrow larger_signed_narrow(Narrow a, Narrow b) { return _mm512_max_epi16(a, b); }
inline Narrow subtract_narrow(Narrow a, Narrow b) { return _mm512_sub_epi16(a, b); }
inline Narrow subtract_to_zero_narrow(Narrow a, Narrow b) { return _mm512_subs_epu16(a, b); }
inline Narrow count_at_most_narrow(Narrow count, Narrow x, Narrow limit) {
    return _mm512_mask_sub_epi16(count, _mm512_cmple_epu16_mask(x, limit), count, _mm512_set1_epi16(-1));
}
inline Narrow no_narrow() { return _mm512_setzero_si512(); }
inline Narrow larger_narrow(Narrow a, Narrow b) { return _mm512_max_epu16(a, b); }
inline uint16_t largest_narrow(Narrow x) {
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return uint16_t(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))), 0));
}

#elif defined(__AVX2__)

constexpr int WIDTH = 8, NARROW_WIDTH = 16;
using Float = __m256;
using Word = __m256i;
using Narrow = __m256i;
using Mask = __m256;

inline Float broadcast(float x) { return _mm256_set1_ps(x); }
inline Word broadcast(uint32_t x) { return _mm256_set1_epi32(int(x)); }
inline Float as_float(Word x) { return _mm256_castsi256_ps(x); }
inline Word as_word(Float x) { return _mm256_castps_si256(x); }
inline Float load_float32(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
inline Float load_bfloat16(const void* p) { return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16)); }
inline Float even_bfloat16(Word pairs) { return as_float(_mm256_slli_epi32(pairs, 16)); }
inline Float load_float16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Float load_e4m3_as_float16(const void* p) {
    const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p))), magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7F));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
    return _mm256_cvtph_ps(_mm_or_si128(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(short(0xBFFF))), nan));
}
inline Word load_bytes(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline Word load_signed_bytes(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline void store_low_bytes(void* p, Word x) {
    // The low byte of each lane to the front of its half, then the two fours side by side.
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i fours = _mm256_shuffle_epi8(x, order);
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
}
inline void store_saturated(void* p, Word x) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void store_low_bytes(void* p, Word even, Word odd) {
    __m256i words = _mm256_and_si256(_mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA), _mm256_set1_epi16(0xFF));
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store_saturated(void* p, Word even, Word odd) {
    __m256i words = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void store_float32(void* p, Float x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
inline void store_low_words(void* p, Word x) {
    __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
inline void store_float16(void* p, Float x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
inline Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float negated_multiply_add(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
inline Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
inline Float to_float(Word x) { return _mm256_cvtepi32_ps(x); }
inline Word nearest(Float x) { return _mm256_cvtps_epi32(x); }
inline Word add(Word a, Word b) { return _mm256_add_epi32(a, b); }
inline Word only(Word a, uint32_t b) { return _mm256_and_si256(a, broadcast(b)); }
inline Word either(Word a, Word b) { return _mm256_or_si256(a, b); }
template <int N> inline Word shift_right(Word x) { return _mm256_srli_epi32(x, N); }
template <int N> inline Word shift_left(Word x) { return _mm256_slli_epi32(x, N); }
inline Word select_bits(uint32_t which, Word yes, Word no) { return _mm256_or_si256(only(yes, which), only(no, ~which)); }
inline Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask is_nan(Float a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
inline bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
inline Mask equal(Word a, uint32_t b) { return as_float(_mm256_cmpeq_epi32(a, broadcast(b))); }
inline Float choose(Mask m, Float yes, Float no) { return _mm256_blendv_ps(no, yes, m); }
inline Word choose(Mask m, Word yes, Word no) { return as_word(choose(m, as_float(yes), as_float(no))); }

inline Word larger(Word a, Word b) { return _mm256_max_epu32(a, b); }
inline Word smaller(Word a, Word b) { return _mm256_min_epu32(a, b); }
inline Word larger_signed(Word a, Word b) { return _mm256_max_epi32(a, b); }
inline Word subtract(Word a, Word b) { return _mm256_sub_epi32(a, b); }
inline Word count_at_most(Word count, Word x, Word limit) { return _mm256_sub_epi32(count, _mm256_cmpeq_epi32(_mm256_min_epu32(x, limit), x)); }
inline void store_words(void* p, Word x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Word load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline uint32_t largest(Word x) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
    return uint32_t(_mm_extract_epi32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1)), 0));
}
inline float largest(Float x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float sum(Float x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Narrow load_narrow(const void* p, uint16_t mask) { return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_set1_epi16(short(mask))); }
inline Narrow broadcast_narrow(uint16_t x) { return _mm256_set1_epi16(short(x)); }
inline Narrow only_narrow(Narrow a, uint16_t b) { return _mm256_and_si256(a, broadcast_narrow(b)); }
inline Narrow smaller_narrow(Narrow a, Narrow b) { return _mm256_min_epu16(a, b); }
inline Narrow larger_signed_narrow(Narrow a, Narrow b) { return _mm256_max_epi16(a, b); }
inline Narrow subtract_narrow(Narrow a, Narrow b) { return _mm256_sub_epi16(a, b); }
inline Narrow subtract_to_zero_narrow(Narrow a, Narrow b) { return _mm256_subs_epu16(a, b); }
inline Narrow count_at_most_narrow(Narrow count, Narrow x, Narrow limit) { return _mm256_sub_epi16(count, _mm256_cmpeq_epi16(_mm256_min_epu16(x, limit), x)); }
inline Narrow no_narrow() { return _mm256_setzero_si256(); }
inline Narrow larger_narrow(Narrow a, Narrow b) { return _mm256_max_epu16(a, b); }
inline uint16_t largest_narrow(Narrow x) {
    __m128i half = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return uint16_t(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1))), 0));
}

#else

constexpr int WIDTH = 1, NARROW_WIDTH = 1;
using Float = float;
using Mask = bool;
struct Word { uint32_t bits; };
using Narrow = uint16_t;

inline Float broadcast(float x) { return x; }
inline Word broadcast(uint32_t x) { return {x}; }
inline Float as_float(Word x) { float y; std::memcpy(&y, &x.bits, 4); return y; }
inline Word as_word(Float x) { Word y; std::memcpy(&y.bits, &x, 4); return y; }
template <class T> inline T load(const void* p) { T x; std::memcpy(&x, p, sizeof x); return x; }
inline Float load_float32(const void* p) { return load<float>(p); }
inline Float load_bfloat16(const void* p) { return as_float({uint32_t(load<uint16_t>(p)) << 16}); }
inline Float even_bfloat16(Word pairs) { return as_float({pairs.bits << 16}); }
inline Float load_float16(const void* p) {
    // Exponent and mantissa moved into place are 2^112 too small, subnormals included; the product is exact.
    uint32_t bits = load<uint16_t>(p), magnitude = (bits & 0x7FFFu) << 13;
    uint32_t scaled = as_word(as_float({magnitude}) * 0x1p112f).bits;
    return as_float({(magnitude >= (31u << 23) ? magnitude | 0x7F800000u : scaled) | ((bits & 0x8000u) << 16)});
}
inline Word load_bytes(const void* p) { return {load<uint8_t>(p)}; }
inline Word load_signed_bytes(const void* p) { return {uint32_t(int32_t(load<int8_t>(p)))}; }
inline void store_low_bytes(void* p, Word x) { *static_cast<uint8_t*>(p) = uint8_t(x.bits); }
inline void store_saturated(void* p, Word x) {
    int32_t value = int32_t(x.bits);
    *static_cast<int8_t*>(p) = int8_t(value < -128 ? -128 : value > 127 ? 127 : value);
}
inline void store_low_bytes(void* p, Word even, Word odd) { store_low_bytes(p, even), store_low_bytes(static_cast<uint8_t*>(p) + 1, odd); }
inline void store_saturated(void* p, Word even, Word odd) { store_saturated(p, even), store_saturated(static_cast<uint8_t*>(p) + 1, odd); }
inline void prefetch(const void*) {}
inline void store_float32(void* p, Float x) { std::memcpy(p, &x, 4); }
inline void store_low_words(void* p, Word x) { uint16_t low = uint16_t(x.bits); std::memcpy(p, &low, 2); }
inline void store_float16(void* p, Float x) {
    uint32_t bits = as_word(x).bits, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu, half;
    if (magnitude > 0x7F800000u) half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    else if (magnitude >= 0x477FF000u) half = 0x7C00u;  // what rounds to 2^16 or more
    else if (magnitude < 0x38800000u) half = as_word(as_float({magnitude}) + 0.5f).bits - 0x3F000000u;  // subnormal: 2^-24 is the spacing of [0.5, 1)
    else half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    store_low_words(p, {sign | half});
}
inline Float add(Float a, Float b) { return a + b; }
inline Float multiply(Float a, Float b) { return a * b; }
inline Float multiply_add(Float a, Float b, Float c) { return a * b + c; }  // rounds twice
inline Float divide(Float a, Float b) { return a / b; }
inline Float smaller(Float a, Float b) { return a < b ? a : b; }
inline Float larger(Float a, Float b) { return a > b ? a : b; }
inline Float to_float(Word x) { return float(int32_t(x.bits)); }
inline Word nearest(Float x) { return {uint32_t(int32_t(std::nearbyint(x)))}; }
inline Word add(Word a, Word b) { return {a.bits + b.bits}; }
inline Word only(Word a, uint32_t b) { return {a.bits & b}; }
inline Word either(Word a, Word b) { return {a.bits | b.bits}; }
template <int N> inline Word shift_right(Word x) { return {x.bits >> N}; }
template <int N> inline Word shift_left(Word x) { return {x.bits << N}; }
inline Word select_bits(uint32_t which, Word yes, Word no) { return {(yes.bits & which) | (no.bits & ~which)}; }
inline Mask less(Float a, Float b) { return a < b; }
inline Mask is_nan(Float a) { return a != a; }
inline bool any(Mask m) { return m; }
inline Mask equal(Word a, uint32_t b) { return a.bits == b; }
inline Word choose(Mask m, Word yes, Word no) { return m ? yes : no; }
inline Float choose(Mask m, Float yes, Float no) { return m ? yes : no; }

inline Word larger(Word a, Word b) { return a.bits > b.bits ? a : b; }
inline Word smaller(Word a, Word b) { return a.bits < b.bits ? a : b; }
inline Word larger_signed(Word a, Word b) { return int32_t(a.bits) > int32_t(b.bits) ? a : b; }
inline Word subtract(Word a, Word b) { return {a.bits - b.bits}; }
inline Word count_at_most(Word count, Word x, Word limit) { return {count.bits + (x.bits <= limit.bits)}; }
inline void store_words(void* p, Word x) { std::memcpy(p, &x.bits, 4); }
inline Word load_words(const void* p) { return {load<uint32_t>(p)}; }
inline uint32_t largest(Word x) { return x.bits; }
inline float largest(Float x) { return x; }
inline float sum(Float x) { return x; }
inline Narrow load_narrow(const void* p, uint16_t mask) { return load<uint16_t>(p) & mask; }
inline Narrow no_narrow() { return 0; }
inline Narrow larger_narrow(Narrow a, Narrow b) { return a > b ? a : b; }
inline uint16_t largest_narrow(Narrow x) { return x; }

#endif

// Rounded to nearest, ties to even; a NaN stays one.
inline void store_bfloat16(void* p, Float x) {
    Word bits = as_word(x), parity = only(shift_right<16>(bits), 1u);
    Word rounded = add(add(bits, parity), broadcast(0x7FFFu));
    store_low_words(p, shift_right<16>(choose(is_nan(x), broadcast(0x7FC00000u), rounded)));
}

}  // namespace lanes
}  // namespace QK_LEVEL
