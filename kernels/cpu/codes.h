// Codes to float32, for one instruction set.
#pragma once

#include "lanes.h"

namespace QK_LEVEL {

// E4M3: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F and 0xFF are NaN, there is no infinity.
inline lanes::Float decode_e4m3(const uint8_t* codes) {
#if defined(__F16C__)
    // Moved into float16's place a code is 2^-8 times its value, subnormals included; NaN's would be 480 times 2^-8.
    return lanes::multiply(lanes::load_e4m3_as_float16(codes), lanes::broadcast(256.0f));
#endif
    const lanes::Word code = lanes::load_bytes(codes), magnitude = lanes::only(code, 0x7Fu);
    // Exponent and mantissa moved into place want 120 more in the exponent; below 8 there is a subnormal, so many times 2^-9. (One multiplication by 2^120
    // would do for both, but subnormal float32 operands cost a hundred cycles.)
    const lanes::Float count = lanes::to_float(magnitude);
    lanes::Word bits = lanes::add(lanes::shift_left<20>(magnitude), lanes::broadcast(120u << 23));
    bits = lanes::choose(lanes::less(count, lanes::broadcast(8.0f)), lanes::as_word(lanes::multiply(count, lanes::broadcast(0x1p-9f))), bits);
    bits = lanes::choose(lanes::equal(magnitude, 0x7Fu), lanes::broadcast(0x7FC00000u), bits);
    return lanes::as_float(lanes::either(bits, lanes::shift_left<24>(lanes::only(code, 0x80u))));
}

inline lanes::Float decode_int8(const uint8_t* codes) { return lanes::to_float(lanes::load_signed_bytes(codes)); }

}  // namespace QK_LEVEL
