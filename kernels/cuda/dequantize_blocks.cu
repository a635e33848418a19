// x[r][c] = store(code[r][c] * scale[r / block_rows][c / block_columns]): blocks of any shape, products in float32.
//
// Bit for bit equal to quantkit/ops/reference.py: dequantize.

#include "numbers.h"

namespace {

struct Blocks {
    const uint8_t* codes;  // [rows, columns], rows row_stride apart
    int64_t rows, columns, row_stride, block_rows, block_columns, across;
    const float* scale;  // [block rows, across]
    void* values;        // [rows, columns] of `output`, dense
    int output;          // QkInput
};

// Four codes of a thread, 16 or 8 bytes of output, where rows and blocks are multiples of four; one else. A block of threads has a row.
template <int FORMAT, int VECTOR>
__global__ void __launch_bounds__(256) decode(const Blocks b) {
    const int64_t row = blockIdx.x;
    const int of_row = int(b.columns / VECTOR);
    const uint32_t block_columns = uint32_t(b.block_columns < b.columns ? b.block_columns : b.columns);
    const float* const scales = b.scale + row / b.block_rows * b.across;
    for (int at = int(threadIdx.x); at < of_row; at += int(blockDim.x)) {
        const uint32_t column = uint32_t(at) * VECTOR;
        const int64_t i = row * of_row + at;
        const float scale = scales[column / block_columns];
        const uint8_t* from = b.codes + row * b.row_stride + column;
        if constexpr (VECTOR == 1) {
            numbers::store(b.values, b.output, i, hw::multiply(numbers::decode(FORMAT, *from), scale));
        } else {
            const uint32_t codes = *reinterpret_cast<const uint32_t*>(from);
            float values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = hw::multiply(numbers::decode(FORMAT, codes >> 8 * j & 0xFFu), scale);
            if (b.output == QK_FLOAT32) static_cast<uint4*>(b.values)[i] = {hw::bits_of(values[0]), hw::bits_of(values[1]), hw::bits_of(values[2]), hw::bits_of(values[3])};
            else static_cast<uint2*>(b.values)[i] = {numbers::narrow_pair(b.output, values[0], values[1]), numbers::narrow_pair(b.output, values[2], values[3])};
        }
    }
}

template <int FORMAT>
int launch(const Blocks& b, void* stream) {
    const bool aligned = reinterpret_cast<uintptr_t>(b.codes) % 4 == 0 && reinterpret_cast<uintptr_t>(b.values) % 16 == 0 && b.columns % 4 == 0 &&
                         b.row_stride % 4 == 0 && (b.block_columns % 4 == 0 || b.across == 1);
    if (b.rows >= int64_t(1) << 31 || b.columns >= int64_t(1) << 31) return -1;
    const int64_t of_row = b.columns / (aligned ? 4 : 1);
    const int threads = of_row >= 256 ? 256 : int((of_row + 31) / 32 * 32);
    const hw::Grid grid{unsigned(b.rows), 1, 1};
    return aligned ? hw::launch(decode<FORMAT, 4>, grid, threads, 0, stream, b) : hw::launch(decode<FORMAT, 1>, grid, threads, 0, stream, b);
}

}  // namespace

// codes: [rows, columns] bytes, rows row_stride apart; scale: [block rows, block columns] float32; values: [rows, columns] of `output` (QkInput), dense.
// Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_dequantize(const void* codes, int format, int64_t rows, int64_t columns, int64_t row_stride, int64_t block_rows, int64_t block_columns,
                                  const float* scale, int output, void* values, void* stream) {
    if (rows < 1 || columns < 1 || row_stride < (rows > 1 ? columns : 0) || block_rows < 1 || block_columns < 1 || format < 0 || format >= QK_FORMATS) return -1;
    if (output < 0 || output >= QK_INPUTS) return -1;
    const Blocks b{static_cast<const uint8_t*>(codes), rows, columns, row_stride, block_rows, block_columns, (columns + block_columns - 1) / block_columns, scale, values, output};
    return format == QK_INT8 ? launch<QK_INT8>(b, stream) : launch<QK_E4M3>(b, stream);
}
