// The library's C functions: check what was passed, pick the instruction set once, call its kernels. Each returns 0, or -1 for arguments that no
// kernel takes. Nothing here knows torch; quantkit/ops.py calls it through ctypes.

#include "quantize_blocks.h"

namespace scalar { extern const QkKernels KERNELS; }
#if defined(QK_X86)
namespace avx2 { extern const QkKernels KERNELS; }
namespace avx512 { extern const QkKernels KERNELS; }
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

const QkKernels& kernels() {
#if defined(QK_X86)
    if (current_level == AVX512) return avx512::KERNELS;
    if (current_level == AVX2) return avx2::KERNELS;
#endif
    return scalar::KERNELS;
}

bool is_matrix(const QkMatrix& m) {
    return m.rows >= 0 && m.columns >= 0 && m.row_stride >= m.columns && m.block_rows > 0 && m.block_columns > 0;
}

bool is_within(int value, int end) { return value >= 0 && value < end; }

}  // namespace

extern "C" {

// Raised when a function's arguments change, so that ops.py refuses a library of another version.
int qk_cpu_version() { return 1; }

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

}  // extern "C"
