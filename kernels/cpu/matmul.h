// What the matmul_*.cpp files give to dispatch.cpp: one table of functions for each instruction set.
//
// output[m][n] = store( sum_g( sum_{k in g} a[m][k] w[n][k] ) scale_a[m][g] scale_w[g][n] + bias[n] )
#pragma once

#include <cstdint>

#include "score_logits.h"

enum QkOutput { QK_TO_BFLOAT16, QK_TO_FLOAT16, QK_TO_FLOAT32, QK_OUTPUTS };
// What a packed weight holds, and so which multiplication it is for.
enum QkPacking { QK_PACKED_INT8_DOT, QK_PACKED_INT8, QK_PACKED_E4M3, QK_PACKED_BFLOAT16, QK_PACKINGS };

// Packed weights: panels of 16 output features, each with all input features, padded with zeros to a multiple of 64. Within a panel:
//   INT8_DOT  [k / 4][16 n][4 k] bytes, code + 128: what vpdpbusd and tdpbsud multiply
//   INT8, E4M3  [k][16 n] bytes
//   BFLOAT16  [k / 2][16 n][2 k] bfloat16: what vdpbf16ps and tdpbf16ps multiply
constexpr int64_t QK_PANEL = 16, QK_INNER_UNIT = 64;

inline int64_t qk_rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Sizes and side inputs of one multiplication. Steps are in elements, 0 where one value serves all.
struct QkMatmul {
    int64_t rows, columns, inner;  // tokens, output features, input features
    int64_t row_stride;            // of the activations
    int64_t group;                 // input features that share scales; as many as there are, or a multiple of 4
    const float* activation_scale;  // nullptr: 1
    int64_t activation_row_step, activation_group_step;
    const float* weight_scale;  // [groups, columns], columns side by side; nullptr: 1
    int64_t weight_group_step;
    const int32_t* zero_point;  // of the activations, INT8 only; nullptr: 0
    int64_t zero_point_step;
    const int32_t* weight_sums;  // [columns], sum of each output feature's codes; needed with zero_point
    const float* bias;           // [columns] or nullptr
    void* output;                // [rows, columns] dense
    int output_type, threads;
    bool powers_of_two;  // the scales are: they may be multiplied into the operands
};

// Each returns false where memory for the rearranged activations can't be had.
struct QkMatmulKernels {
    bool (*int8)(const QkMatmul&, const int8_t* activations, const uint8_t* packed);
    bool (*fp8)(const QkMatmul&, const uint8_t* activations, const uint8_t* packed);
    bool (*weight_only_int8)(const QkMatmul&, const uint16_t* activations, const uint8_t* packed);
    bool (*weight_only_e4m3)(const QkMatmul&, const uint16_t* activations, const uint8_t* packed);
    bool (*bf16)(const QkMatmul&, const uint16_t* activations, const uint8_t* packed);
    bool (*score_logits)(const QkScores&);
};
