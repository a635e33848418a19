// What distinguishes INT8, FP8 and weight-only multiplications of a warp: the type of a sum, and how codes become fragments of mma.sync.
//
// Each struct multiplies a fragment of weights by one of activations, 32 input features deep. Fragments of codes are four words for 16 rows (hardware.h) and
// two for 8 columns; bfloat16 activations stand in an order of K that suits the codes: any order does that both sides have.
#pragma once

#include "multiply.h"

namespace operands {

struct Int8 {
    using Sum = int32_t;
    static constexpr int ACTIVATION_BYTES = 1;
    QK_DEVICE static void multiply(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { hw::mma_int8(d, a, b0, b1); }
};

// Where there is no mma.sync for E4M3 (sm_80), codes become float16: products are exact in either, sums float32.
struct E4M3 {
    using Sum = float;
    static constexpr int ACTIVATION_BYTES = 1;
    QK_DEVICE static void multiply(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if QK_ARCHITECTURE >= 890
        hw::mma_e4m3(d, a, b0, b1);
#elif QK_ARCHITECTURE > 0
        for (const bool first : {true, false}) {
            uint32_t pairs[4];
            for (int i = 0; i < 4; ++i) pairs[i] = numbers::e4m3_to_float16_pair(a[i], first);
            hw::mma_float16(d, pairs, numbers::e4m3_to_float16_pair(b0, first), numbers::e4m3_to_float16_pair(b1, first));
        }
#endif
    }
};

// Codes of weights alone; activations are bfloat16.
struct Int8Weight {
    using Sum = float;
    static constexpr int ACTIVATION_BYTES = 2;
    static constexpr bool HAS_NAN = false;
    QK_DEVICE static uint32_t pair(uint32_t codes, bool first) { return numbers::int8_to_bfloat16_pair(codes, first); }
    QK_DEVICE static uint32_t pair_or_nan(uint32_t codes, bool first) { return numbers::int8_to_bfloat16_pair(codes, first); }
};

struct E4M3Weight {
    using Sum = float;
    static constexpr int ACTIVATION_BYTES = 2;
    static constexpr bool HAS_NAN = true;
    QK_DEVICE static uint32_t pair(uint32_t codes, bool first) { return numbers::e4m3_to_bfloat16_pair<false>(codes, first); }  // takes NaN for 480
    QK_DEVICE static uint32_t pair_or_nan(uint32_t codes, bool first) { return numbers::e4m3_to_bfloat16_pair<true>(codes, first); }
};

}  // namespace operands
