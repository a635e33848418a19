// What tests ask of the emulated library besides its kernels: how to run, and numbers.h's conversions one by one.

#include "numbers.h"

extern "C" {

void qk_emulator_configure(int multiprocessors, unsigned seed) { emulator::state.multiprocessors = multiprocessors, emulator::state.seed = seed; }

void qk_host_encode(int format, const float* values, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = uint8_t(format == QK_E4M3 ? numbers::encode_e4m3(values[i]) : numbers::encode_int8(values[i]));
}

void qk_host_decode(int format, const uint8_t* codes, int64_t count, float* values) {
    for (int64_t i = 0; i < count; ++i) values[i] = numbers::decode(format, codes[i]);
}

void qk_host_widen(int type, const uint16_t* from, int64_t count, float* values) {
    for (int64_t i = 0; i < count; ++i) values[i] = type == QK_BFLOAT16 ? numbers::bfloat16_to_float(from[i]) : numbers::float16_to_float(from[i]);
}

void qk_host_narrow(int type, const float* values, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = numbers::narrow(type, values[i]);
}

void qk_host_divide(const float* values, int64_t count, float scale, float* quotients) {
    const numbers::Divider divide(scale);
    for (int64_t i = 0; i < count; ++i) quotients[i] = divide(values[i]);
}

// kind: 0 E4M3 to float16, 1 E4M3 to bfloat16, 2 the same without NaN, 3 INT8 to bfloat16. codes: a multiple of four; pairs: their 16-bit numbers.
void qk_host_pairs(int kind, const uint32_t* codes, int64_t words, uint32_t* pairs) {
    for (int64_t i = 0; i < words; ++i)
        for (int j = 0; j < 2; ++j)
            pairs[2 * i + j] = kind == 0   ? numbers::e4m3_to_float16_pair(codes[i], j == 0)
                               : kind == 1 ? numbers::e4m3_to_bfloat16_pair<true>(codes[i], j == 0)
                               : kind == 2 ? numbers::e4m3_to_bfloat16_pair<false>(codes[i], j == 0)
                                           : numbers::int8_to_bfloat16_pair(codes[i], j == 0);
}

}
