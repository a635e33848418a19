// code = encode(x), x = decode(code): E4M3, INT8, bfloat16 and float16 as bits, on the device and on the host.
//
// Bit for bit quantkit/ops/reference.py: encode_codes. The host's versions are compiled into tests/kernels, which go through all codes.
#pragma once

#include <cstdint>

#include "hardware.h"

enum QkInput { QK_BFLOAT16, QK_FLOAT16, QK_FLOAT32, QK_INPUTS };  // the order of kernels/cpu/quantize_blocks.h
enum QkFormat { QK_INT8, QK_E4M3, QK_FORMATS };
enum QkScaleRule { QK_STORED, QK_POWER_OF_TWO, QK_DYNAMIC, QK_SCALE_RULES };

namespace numbers {

constexpr float E4M3_LARGEST = 448.0f, INT8_LARGEST = 127.0f;
constexpr uint32_t INFINITY_BITS = 0x7F800000u;

// ---- Float types of inputs and outputs.

QK_ANYWHERE float bfloat16_to_float(uint16_t x) { return hw::float_of(uint32_t(x) << 16); }

QK_ANYWHERE uint16_t float_to_bfloat16(float x) {
#ifdef QK_ON_DEVICE
    return hw::float_to_bfloat16(x);
#else
    const uint32_t bits = hw::bits_of(x);
    if ((bits & 0x7FFFFFFFu) > INFINITY_BITS) return uint16_t(bits >> 16 | 0x40u);  // NaN stays one
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
#endif
}

QK_ANYWHERE float float16_to_float(uint16_t x) {
#ifdef QK_ON_DEVICE
    return hw::float16_to_float(x);
#else
    const uint32_t magnitude = x & 0x7FFFu, sign = uint32_t(x & 0x8000u) << 16;
    if (magnitude >= 0x7C00u) return hw::float_of(sign | INFINITY_BITS | (magnitude & 0x3FFu) << 13);
    if (magnitude < 0x400u) return hw::float_of(sign | hw::bits_of(float(magnitude) * 0x1p-24f));  // subnormals
    return hw::float_of(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

QK_ANYWHERE uint16_t float_to_float16(float x) {
#ifdef QK_ON_DEVICE
    return hw::float_to_float16(x);
#else
    const uint32_t bits = hw::bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    if (magnitude > INFINITY_BITS) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // from 65520 on: infinity
    if (magnitude < 0x38800000u) return uint16_t(sign | (hw::bits_of(hw::float_of(magnitude) + 0.5f) - 0x3F000000u));  // steps of 2^-24, rounded by the sum
    return uint16_t(sign | (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
#endif
}

// ---- Codes.

// Adding a float whose spacing is that of the codes rounds to the nearest code, ties to even; kernels/cpu/quantize_blocks.cpp has the constants' reasons.
QK_ANYWHERE uint32_t encode_e4m3(float x) {
    const uint32_t bits = hw::bits_of(x), sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > INFINITY_BITS) return sign | 0x7Fu;
    const uint32_t largest = hw::bits_of(E4M3_LARGEST);
    magnitude = magnitude < largest ? magnitude : largest;
    const uint32_t exponent = magnitude & INFINITY_BITS, least = 121u << 23;  // below 2^-6 there are subnormals, spaced as at 2^-6
    const uint32_t octave = exponent > least ? exponent : least;
    const float sum = hw::add(hw::float_of(magnitude), hw::float_of(octave + (20u << 23) + 56u));
    return sign | ((hw::bits_of(sum) + (octave >> 20)) & 0x7Fu);
}

QK_ANYWHERE float decode_e4m3(uint32_t code) {
    const uint32_t magnitude = code & 0x7Fu, sign = (code & 0x80u) << 24;
    if (magnitude == 0x7Fu) return hw::float_of(sign | 0x7FC00000u);
    if (magnitude < 8u) return hw::float_of(sign | hw::bits_of(float(magnitude) * 0x1p-9f));
    return hw::float_of(sign | ((magnitude << 20) + (120u << 23)));
}

// Clamping first gives the same integers, because the limits are integers.
QK_ANYWHERE uint32_t encode_int8(float x) {
    x = x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x;
    return uint32_t(hw::round_to_int(x)) & 0xFFu;
}

QK_ANYWHERE float decode_int8(uint32_t code) { return float(int8_t(code)); }

template <int FORMAT>
QK_ANYWHERE uint32_t encode(float x) {
    return FORMAT == QK_E4M3 ? encode_e4m3(x) : encode_int8(x);
}

QK_ANYWHERE float decode(int format, uint32_t code) { return format == QK_E4M3 ? decode_e4m3(code) : decode_int8(code); }

// ---- Four codes to operands of the tensor cores, pairs in one word: low half first. `first`: the codes in bytes 0 and 1, else those in 2 and 3.

// Exponent and mantissa moved into float16's place are the value times 2^-8, subnormals included. An E4M3 NaN has all seven bits set: only there does
// adding one of the last place reach float16's top exponent bit, which makes a NaN of it.
QK_DEVICE uint32_t e4m3_to_float16_pair(uint32_t codes, bool first) {
    const uint32_t spread = hw::select_bytes(codes, 0u, first ? 0x1404u : 0x3424u);  // code in the high byte of each half
    uint32_t pair = spread >> 1 & 0x3F803F80u;
    pair |= (pair + 0x00800080u) & 0x40004000u;
    return hw::multiply_float16_pair(pair | (spread & 0x80008000u), 0x5C005C00u);  // 2^8
}

// The same for bfloat16, whose bias differs by 120. NaN: all exponent bits are set from the one that the sum reaches.
template <bool NAN_TOO>
QK_DEVICE uint32_t e4m3_to_bfloat16_pair(uint32_t codes, bool first) {
    const uint32_t spread = hw::select_bytes(codes, 0u, first ? 0x1404u : 0x3424u);
    uint32_t pair = spread >> 4 & 0x07F007F0u;
    if (NAN_TOO) pair |= ((pair + 0x00100010u) & 0x08000800u) * 15u;
    return hw::multiply_bfloat16_pair(pair | (spread & 0x80008000u), 0x7B807B80u);  // 2^120
}

// 0x43cc is the bfloat16 128 + (c & 127), or with c's top bit 256 + 2 (c & 127): so that bit is taken out and subtracted, as 128 or 256. Exact.
QK_DEVICE uint32_t int8_to_bfloat16_pair(uint32_t codes, bool first) {
    const uint32_t spread = hw::select_bytes(codes, 0x43434343u, first ? 0x4140u : 0x4342u);
    return hw::subtract_bfloat16_pair(spread & 0xFF7FFF7Fu, spread & 0xFF80FF80u);
}

// ---- Scales.

QK_ANYWHERE float power_of_two_scale(float amax, float largest) {
    const uint32_t bits = hw::bits_of(amax), top = hw::bits_of(largest);
    if (bits == 0) return 1.0f;
    if (bits >= INFINITY_BITS) return amax;
    int exponent = int(bits >> 23) - int(top >> 23) + ((bits & 0x7FFFFFu) > (top & 0x7FFFFFu));
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return hw::float_of(exponent == -127 ? 0x00400000u : uint32_t(exponent + 127) << 23);
}

// quantkit/ops/reference.py: choose_scale.
template <int FORMAT>
QK_ANYWHERE float choose_scale(float amax, int rule) {
    constexpr float largest = FORMAT == QK_E4M3 ? E4M3_LARGEST : INT8_LARGEST;
    if (rule == QK_POWER_OF_TWO) return power_of_two_scale(amax, largest);
    const float scale = hw::divide(amax, largest);
    if (rule == QK_DYNAMIC) {
        constexpr float floor = FORMAT == QK_E4M3 ? 1.0f / (448.0f * 512.0f) : 0x1p-23f;
        return scale < floor ? floor : scale;
    }
    if (amax == 0.0f) return 1.0f;
    const float stored = bfloat16_to_float(float_to_bfloat16(scale));
    return stored < 0x1p-126f ? 0x1p-126f : stored;  // the smallest normal: dividing by less can overflow
}

// x / scale, correctly rounded, by two fused multiply-adds where the scale is moderate; kernels/cpu/quantize_blocks.cpp has the proof.
struct Divider {
    float scale, reciprocal;
    bool is_moderate;
    QK_ANYWHERE explicit Divider(float s) : scale(s), reciprocal(hw::divide(1.0f, s)), is_moderate(s >= 0x1p-60f && s <= 0x1p60f) {}
    QK_ANYWHERE float operator()(float x) const {
        if (!is_moderate) return hw::divide(x, scale);
        const float product = hw::multiply(x, reciprocal);
        const float quotient = hw::multiply_add(hw::multiply_add(-product, scale, x), reciprocal, product);
        // What is large, infinite or NaN must not be improved: infinity less infinity is NaN. The sign is the dividend's: an improved quotient of -0 is +0.
        const uint32_t bits = hw::bits_of((hw::bits_of(product) & 0x7FFFFFFFu) < hw::bits_of(0x1p20f) ? quotient : product);
        return hw::float_of((bits & 0x7FFFFFFFu) | (hw::bits_of(x) & 0x80000000u));
    }
};

// ---- Elements of inputs and outputs.

QK_ANYWHERE int size_of(int type) { return type == QK_FLOAT32 ? 4 : 2; }

template <int INPUT>
QK_ANYWHERE float load(const void* values, int64_t index) {
    if (INPUT == QK_FLOAT32) return static_cast<const float*>(values)[index];
    const uint16_t x = static_cast<const uint16_t*>(values)[index];
    return INPUT == QK_BFLOAT16 ? bfloat16_to_float(x) : float16_to_float(x);
}

// A value as 16 bits, and two, the first in the low half.
QK_ANYWHERE uint16_t narrow(int type, float value) { return type == QK_BFLOAT16 ? float_to_bfloat16(value) : float_to_float16(value); }

QK_ANYWHERE uint32_t narrow_pair(int type, float first, float second) { return narrow(type, first) | uint32_t(narrow(type, second)) << 16; }

QK_ANYWHERE void store(void* values, int type, int64_t index, float value) {
    if (type == QK_FLOAT32) static_cast<float*>(values)[index] = value;
    else static_cast<uint16_t*>(values)[index] = narrow(type, value);
}

}  // namespace numbers
