// The library's C functions: check what was passed, pick the instruction set once, call its kernels. Each returns 0, or -1 for arguments that no
// kernel takes. Nothing here knows torch; quantkit/ops/cpu.py calls it through ctypes.

#include <algorithm>

#include "matmul.h"
#include "observe_rows.h"
#include "pack_weight.h"
#include "quantize_blocks.h"

#if defined(QK_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define QK_DECLARE(level) \
    namespace level { extern const QkKernels KERNELS; extern const QkRowKernels ROW_KERNELS; }
#define QK_DECLARE_MATMUL(level) \
    namespace level { extern const QkMatmulKernels MATMUL_KERNELS; }
QK_DECLARE(scalar)
QK_DECLARE_MATMUL(scalar)
#if defined(QK_X86)
QK_DECLARE(avx2)
QK_DECLARE(avx512)
QK_DECLARE_MATMUL(avx2)
QK_DECLARE_MATMUL(avx512)
QK_DECLARE_MATMUL(avx512vnni)
QK_DECLARE_MATMUL(avx512bf16)
#if defined(QK_AVXVNNI)
QK_DECLARE_MATMUL(avxvnni)
#endif
#if defined(QK_AMX)
QK_DECLARE_MATMUL(amx)
#endif
#endif

namespace {

// Each has all of an earlier one, but that AVX-VNNI is AVX2's alone: the machines with AVX-512 that lack it are many.
enum Level { SCALAR, AVX2, AVXVNNI, AVX512, AVX512VNNI, AVX512BF16, AMX, LEVELS };

#if defined(QK_X86)
struct Leaf7 {
    unsigned ebx = 0, ecx = 0, edx = 0, eax1 = 0;
    Leaf7() {
        unsigned eax, b, c, d;
        if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1) __get_cpuid_count(7, 1, &eax1, &b, &c, &d);
    }
};

// AMX's registers are given to a process that asks for them.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

bool is_supported(int level) {
    if (level == SCALAR) return true;
#if defined(QK_X86)
    static const Leaf7 cpu;
    const auto has = [](unsigned bits, int bit) { return (bits >> bit & 1u) != 0; };
    // The compiler's own checks see to it that the system saves the wide registers.
    if (level == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(QK_AVXVNNI)
    if (level == AVXVNNI) return is_supported(AVX2) && has(cpu.eax1, 4);
#endif
    if (level == AVX512)
        return is_supported(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
    if (level == AVX512VNNI) return is_supported(AVX512) && has(cpu.ecx, 11);
    if (level == AVX512BF16) return is_supported(AVX512VNNI) && has(cpu.ecx, 1) && has(cpu.eax1, 5);  // and VBMI
#if defined(QK_AMX)
    if (level == AMX) return is_supported(AVX512BF16) && has(cpu.edx, 22) && has(cpu.edx, 24) && has(cpu.edx, 25) && may_use_tiles();
#endif
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
const QkKernels* const KERNELS[LEVELS] = {&scalar::KERNELS, &avx2::KERNELS,   &avx2::KERNELS,  &avx512::KERNELS,
                                          &avx512::KERNELS, &avx512::KERNELS, &avx512::KERNELS};
const QkRowKernels* const ROW_KERNELS[LEVELS] = {&scalar::ROW_KERNELS, &avx2::ROW_KERNELS,   &avx2::ROW_KERNELS,  &avx512::ROW_KERNELS,
                                                 &avx512::ROW_KERNELS, &avx512::ROW_KERNELS, &avx512::ROW_KERNELS};
#if defined(QK_AVXVNNI)
constexpr const QkMatmulKernels* AVXVNNI_KERNELS = &avxvnni::MATMUL_KERNELS;
#else
constexpr const QkMatmulKernels* AVXVNNI_KERNELS = nullptr;  // not chosen
#endif
#if defined(QK_AMX)
constexpr const QkMatmulKernels* AMX_KERNELS = &amx::MATMUL_KERNELS;
#else
constexpr const QkMatmulKernels* AMX_KERNELS = nullptr;
#endif
const QkMatmulKernels* const MATMUL_KERNELS[LEVELS] = {&scalar::MATMUL_KERNELS,     &avx2::MATMUL_KERNELS,       AVXVNNI_KERNELS, &avx512::MATMUL_KERNELS,
                                                       &avx512vnni::MATMUL_KERNELS, &avx512bf16::MATMUL_KERNELS, AMX_KERNELS};
#else
const QkKernels* const KERNELS[LEVELS] = {&scalar::KERNELS};
const QkRowKernels* const ROW_KERNELS[LEVELS] = {&scalar::ROW_KERNELS};
const QkMatmulKernels* const MATMUL_KERNELS[LEVELS] = {&scalar::MATMUL_KERNELS};
#endif

const QkKernels& kernels() { return *KERNELS[current_level]; }
const QkRowKernels& row_kernels() { return *ROW_KERNELS[current_level]; }
const QkMatmulKernels& matmul_kernels() { return *MATMUL_KERNELS[current_level]; }

bool is_matrix(const QkMatrix& m) {
    return m.rows >= 0 && m.columns >= 0 && m.row_stride >= m.columns && m.block_rows > 0 && m.block_columns > 0;
}

// The arguments of a multiplication, or inner = 0 where they are wrong.
QkMatmul matmul_of(int64_t rows, int64_t columns, int64_t inner, int64_t row_stride, int64_t group, const float* activation_scale, int64_t activation_row_step,
                   int64_t activation_group_step, const float* weight_scale, int64_t weight_group_step, const float* bias, void* output, int output_type, int threads) {
    QkMatmul m{};
    if (rows < 1 || columns < 1 || inner < 1 || row_stride < (rows > 1 ? inner : 0) || group < 1 || (group < inner && group % 4) || threads < 1) return m;
    if (output_type < 0 || output_type >= QK_OUTPUTS) return m;
    m.rows = rows, m.columns = columns, m.inner = inner, m.row_stride = row_stride, m.group = std::min(group, inner);
    m.activation_scale = activation_scale, m.activation_row_step = activation_row_step, m.activation_group_step = activation_group_step;
    m.weight_scale = weight_scale, m.weight_group_step = weight_group_step;
    m.bias = bias, m.output = output, m.output_type = output_type, m.threads = threads;
    return m;
}

bool is_within(int value, int end) { return value >= 0 && value < end; }

}  // namespace

extern "C" {

// Raised when a function's arguments change, so that native.py refuses a library of another version.
int qk_cpu_version() { return 5; }

// An index into the levels above, as in quantkit/ops/native.py.
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

// codes: [rows, columns] bytes, rows row_stride apart; values: [rows, columns] of `output`, one of QkInput, dense.
int qk_dequantize_blocks(const void* codes, int format, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns,
                         const float* scale, int output, void* values) {
    const QkMatrix m{rows, columns, row_stride, block_rows, block_columns};
    if (!is_matrix(m) || !is_within(format, QK_FORMATS) || !is_within(output, QK_INPUTS)) return -1;
    kernels().dequantize_blocks[output][format](m, static_cast<const uint8_t*>(codes), scale, values);
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

// codes: [columns, inner] bytes or bfloat16, rows row_stride elements apart; packed: as QkPacking says.
int qk_pack_weight(int packing, const void* codes, int64_t columns, int64_t inner, int64_t row_stride, void* packed) {
    if (!is_within(packing, QK_PACKINGS) || columns < 0 || inner < 0 || row_stride < (columns > 1 ? inner : 0)) return -1;
    pack_weight(packing, codes, columns, inner, row_stride, packed);
    return 0;
}

// activations: [rows, inner], rows row_stride elements apart; packed: a weight [columns, inner]; output: [rows, columns], dense. Scales are float32, with the
// elements from one token, group of input features, to the next (0: one for all); weight_scale [groups, columns]. Null pointers: 1, or 0 for bias
// and zero_point. -2: no memory.
int qk_matmul_int8(const int8_t* activations, int64_t rows, int64_t inner, int64_t row_stride, const uint8_t* packed, int64_t columns, int64_t group,
                   const float* activation_scale, int64_t activation_row_step, int64_t activation_group_step, const float* weight_scale, int64_t weight_group_step,
                   const float* bias, void* output, int output_type, int threads, const int32_t* zero_point, int64_t zero_point_step, const int32_t* weight_sums) {
    QkMatmul m = matmul_of(rows, columns, inner, row_stride, group, activation_scale, activation_row_step, activation_group_step, weight_scale, weight_group_step,
                           bias, output, output_type, threads);
    m.zero_point = zero_point, m.zero_point_step = zero_point_step, m.weight_sums = weight_sums;
    if (!m.inner || m.inner >= 1 << 17 || (zero_point && (!weight_sums || m.group < m.inner))) return -1;
    return matmul_kernels().int8(m, activations, packed) ? 0 : -2;
}

// powers_of_two: all scales are, as MX has them.
int qk_matmul_fp8(const uint8_t* activations, int64_t rows, int64_t inner, int64_t row_stride, const uint8_t* packed, int64_t columns, int64_t group,
                  const float* activation_scale, int64_t activation_row_step, int64_t activation_group_step, const float* weight_scale, int64_t weight_group_step,
                  const float* bias, void* output, int output_type, int threads, int powers_of_two) {
    QkMatmul m = matmul_of(rows, columns, inner, row_stride, group, activation_scale, activation_row_step, activation_group_step, weight_scale, weight_group_step,
                           bias, output, output_type, threads);
    m.powers_of_two = powers_of_two != 0;
    if (!m.inner) return -1;
    return matmul_kernels().fp8(m, activations, packed) ? 0 : -2;
}

// activations: bfloat16; packed: INT8 or E4M3 codes.
int qk_matmul_weight_only(const uint16_t* activations, int64_t rows, int64_t inner, int64_t row_stride, const uint8_t* packed, int packing, int64_t columns,
                          int64_t group, const float* weight_scale, int64_t weight_group_step, const float* bias, void* output, int output_type, int threads,
                          int powers_of_two) {
    QkMatmul m = matmul_of(rows, columns, inner, row_stride, group, nullptr, 0, 0, weight_scale, weight_group_step, bias, output, output_type, threads);
    m.powers_of_two = powers_of_two != 0;
    if (!m.inner || (packing != QK_PACKED_INT8 && packing != QK_PACKED_E4M3)) return -1;
    const auto kernel = packing == QK_PACKED_INT8 ? matmul_kernels().weight_only_int8 : matmul_kernels().weight_only_e4m3;
    return kernel(m, activations, packed) ? 0 : -2;
}

int qk_matmul_bf16(const uint16_t* activations, int64_t rows, int64_t inner, int64_t row_stride, const uint8_t* packed, int64_t columns, const float* bias,
                   void* output, int output_type, int threads) {
    const QkMatmul m = matmul_of(rows, columns, inner, row_stride, inner, nullptr, 0, 0, nullptr, 0, bias, output, output_type, threads);
    if (!m.inner) return -1;
    return matmul_kernels().bf16(m, activations, packed) ? 0 : -2;
}

// Two models' hidden states [rows, inner] and heads to what score_logits.h lists, [rows] each; of one model if the second's hidden is null.
int qk_score_logits(int64_t rows, int64_t inner, int64_t columns, const int64_t* targets, const uint16_t* hidden, int64_t row_stride, const uint8_t* packed,
                    const float* bias, double* nll, int64_t* index, double* confidence, const uint16_t* own_hidden, int64_t own_row_stride, const uint8_t* own_packed,
                    const float* own_bias, double* own_nll, int64_t* own_index, double* divergence, int threads) {
    if (rows < 1 || inner < 1 || columns < 1 || columns > INT32_MAX || threads < 1 || row_stride < (rows > 1 ? inner : 0)) return -1;
    if (own_hidden && own_row_stride < (rows > 1 ? inner : 0)) return -1;
    const QkScores s{rows, inner, columns, targets, {hidden, row_stride, packed, bias, nll, index, confidence},
                     {own_hidden, own_row_stride, own_packed, own_bias, own_nll, own_index, divergence}, threads};
    return matmul_kernels().score_logits(s) ? 0 : -2;
}

}  // extern "C"
