// What quantize_blocks.cpp gives to dispatch.cpp: one table of functions for each instruction set.
#pragma once

#include <cstdint>

enum QkInput { QK_BFLOAT16, QK_FLOAT16, QK_FLOAT32, QK_INPUTS };
enum QkFormat { QK_INT8, QK_E4M3, QK_FORMATS };
// How a scale follows from an amax: rounded to bfloat16 for a file, the least power of two that fits, or as a server's dynamic one with its floor.
enum QkScaleRule { QK_STORED, QK_POWER_OF_TWO, QK_DYNAMIC, QK_SCALE_RULES };

// A matrix in blocks. row_stride: elements from one row of the input to the next; outputs are dense.
struct QkMatrix {
    int64_t rows, columns, row_stride, block_rows, block_columns;
};

struct QkKernels {
    void (*block_amax[QK_INPUTS])(const QkMatrix&, const void* values, float* amax);
    void (*encode_blocks[QK_INPUTS][QK_FORMATS])(const QkMatrix&, const void* values, const float* scale, uint8_t* codes);
    void (*quantize_blocks[QK_INPUTS][QK_FORMATS])(const QkMatrix&, const void* values, int rule, uint8_t* codes, float* scale);
    void (*dequantize_blocks[QK_INPUTS][QK_FORMATS])(const QkMatrix&, const uint8_t* codes, const float* scale, void* values);
};
