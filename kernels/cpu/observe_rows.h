// What observe_rows.cpp gives to dispatch.cpp: one table of functions for each instruction set.
#pragma once

#include "quantize_blocks.h"

// Columns [first_column, last_column) of a matrix whose rows lie row_stride elements apart.
struct QkColumns {
    int64_t rows, row_stride, first_column, last_column;
};

// What a range of columns adds to. Channels are counted from the matrix's first column; all but row_magnitudes accumulate.
struct QkStatistics {
    float* channel_amax;             // [columns]
    double* channel_sum_of_squares;  // [columns]
    int64_t* histogram;              // [1024]
    float* extremes;                 // [2]: minimum, maximum
    int64_t* above;                  // [1]
    uint32_t* row_magnitudes;        // [rows]: the bits of each row's largest |x| within the range; written
};

struct QkRowKernels {
    void (*observe_rows[QK_INPUTS])(const QkColumns&, const void* values, float above, const QkStatistics&);
    void (*count_magnitudes)(const uint32_t* magnitudes, int64_t ranges, int64_t rows, int64_t* histogram);
};
