// The library's C functions: check what was passed, pick the instruction set once, call its kernels. Each returns 0, or -1 for arguments that no
// kernel takes. Nothing here knows torch; quantkit/ops.py calls it through ctypes.

#include "observe_rows.h"
#include "quantize_blocks.h"

#define QK_DECLARE(level) \
    namespace level { extern const QkKernels KERNELS; extern const QkRowKernels ROW_KERNELS; }
QK_DECLARE(scalar)
#if defined(QK_X86)
QK_DECLARE(avx2)
QK_DECLARE(avx512)
#endif

namespace {

enum Level { SCALAR, AVX2, AVX512, LEVELS };

bool is_supported(int level) {
    if (level == SCALAR) return true;
#if defined(QK_X86)
    if (level == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (level == AVX512)
        return is_supported(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
#endif
    return false;
}

int best_level() {
    for (int level = LEVELS - 1; level > SCALAR; --level)
        if (is_supported(level)) return level;
    return SCALAR;
}

int current_level = best_level();

#if defined(QK_X86)
const QkKernels* const KERNELS[LEVELS] = {&scalar::KERNELS, &avx2::KERNELS, &avx512::KERNELS};
const QkRowKernels* const ROW_KERNELS[LEVELS] = {&scalar::ROW_KERNELS, &avx2::ROW_KERNELS, &avx512::ROW_KERNELS};
#else
const QkKernels* const KERNELS[LEVELS] = {&scalar::KERNELS};
const QkRowKernels* const ROW_KERNELS[LEVELS] = {&scalar::ROW_KERNELS};
#endif

const QkKernels& kernels() { return *KERNELS[current_level]; }
const QkRowKernels& row_kernels() { return *ROW_KERNELS[current_level]; }

bool is_matrix(const QkMatrix& m) {
    return m.rows >= 0 && m.columns >= 0 && m.row_stride >= m.columns && m.block_rows > 0 && m.block_columns > 0;
}

bool is_within(int value, int end) { return value >= 0 && value < end; }

}  // namespace

extern "C" {

// Raised when a function's arguments change, so that ops.py refuses a library of another version.
int qk_cpu_version() { return 2; }

// 0 scalar, 1 AVX2, 2 AVX-512.
int qk_cpu_level() { return current_level; }

// For tests and benchmarks: run another instruction set from now on.
int qk_select_cpu_level(int level) {
    if (!is_within(level, LEVELS) || !is_supported(level)) return -1;
    current_level = level;
    return 0;
}

// values: [rows, columns] of `input`, rows row_stride elements apart; amax: [block rows, block columns] float32.
int qk_block_amax(const void* values, int input, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns, float* amax) {
    const QkMatrix m{rows, columns, row_stride, block_rows, block_columns};
    if (!is_matrix(m) || !is_within(input, QK_INPUTS)) return -1;
    kernels().block_amax[input](m, values, amax);
    return 0;
}

// codes: [rows, columns] bytes, dense; scale: [block rows, block columns] float32, read.
int qk_encode_blocks(const void* values, int input, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns, int format,
                     const float* scale, void* codes) {
    const QkMatrix m{rows, columns, row_stride, block_rows, block_columns};
    if (!is_matrix(m) || !is_within(input, QK_INPUTS) || !is_within(format, QK_FORMATS)) return -1;
    kernels().encode_blocks[input][format](m, values, scale, static_cast<uint8_t*>(codes));
    return 0;
}

// The same with the scales chosen from the values by `rule` and written.
int qk_quantize_blocks(const void* values, int input, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns, int format,
                       int rule, float* scale, void* codes) {
    const QkMatrix m{rows, columns, row_stride, block_rows, block_columns};
    if (!is_matrix(m) || !is_within(input, QK_INPUTS) || !is_within(format, QK_FORMATS) || !is_within(rule, QK_SCALE_RULES)) return -1;
    kernels().quantize_blocks[input][format](m, values, rule, static_cast<uint8_t*>(codes), scale);
    return 0;
}

// codes: [rows, columns] bytes, rows row_stride apart; values: [rows, columns] float32, dense.
int qk_dequantize_blocks(const void* codes, int format, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns,
                         const float* scale, float* values) {
    const QkMatrix m{rows, columns, row_stride, block_rows, block_columns};
    if (!is_matrix(m) || !is_within(format, QK_FORMATS)) return -1;
    kernels().dequantize_blocks[format](m, static_cast<const uint8_t*>(codes), scale, values);
    return 0;
}

// values: [rows, ...] of `input`, of which columns [first_column, last_column) are observed; what it adds to is described in observe_rows.h.
int qk_observe_rows(const void* values, int input, int64_t rows, int64_t row_stride, int64_t first_column, int64_t last_column, float above,
                    float* channel_amax, double* channel_sum_of_squares, int64_t* histogram, float* extremes, int64_t* above_count, uint32_t* row_magnitudes) {
    if (rows < 0 || first_column < 0 || last_column < first_column || row_stride < last_column || !is_within(input, QK_INPUTS)) return -1;
    const QkStatistics statistics{channel_amax, channel_sum_of_squares, histogram, extremes, above_count, row_magnitudes};
    row_kernels().observe_rows[input]({rows, row_stride, first_column, last_column}, values, above, statistics);
    return 0;
}

// magnitudes: [ranges, rows], the rows' largest magnitudes within each range of columns; histogram: [1024], of the rows' largest of all.
int qk_count_magnitudes(const uint32_t* magnitudes, int64_t ranges, int64_t rows, int64_t* histogram) {
    if (ranges < 0 || rows < 0) return -1;
    row_kernels().count_magnitudes(magnitudes, ranges, rows, histogram);
    return 0;
}

}  // extern "C"
