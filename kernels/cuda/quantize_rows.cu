// scale[r][g] = rule(max_{k in g} |x[r][k]|);  code[r][k] = cast(clamp(round(x[r][k] / scale[r][g]))): activations, per token or per group of a token.
//
// Bit for bit equal to quantkit/ops/reference.py: quantize, with blocks of one row. A row longer than a group of 32 lanes' vectors is one block of threads, which
// keeps what it can of it in registers between finding the scale and encoding; short groups are parts of a warp, a vector a lane.

#include "numbers.h"

namespace {

constexpr int VECTOR_BYTES = 16;
constexpr int HELD = 4;  // vectors that a thread keeps: 64 bytes; rows of 4 x 1024 x 8 bfloat16 numbers are read once

template <int INPUT>
constexpr int VECTOR = INPUT == QK_FLOAT32 ? 4 : 8;  // elements of 16 bytes

struct Rows {
    const void* values;  // [rows, columns], rows row_stride elements apart
    int64_t rows, columns, row_stride, group, groups;
    int rule;
    float* scale;    // [rows, groups]
    uint8_t* codes;  // [rows, columns], dense
};

template <int INPUT>
QK_DEVICE void unpack(const uint4& x, float (&values)[VECTOR<INPUT>]) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (INPUT == QK_FLOAT32) values[i] = hw::float_of(words[i]);
        else if constexpr (INPUT == QK_BFLOAT16) values[2 * i] = hw::float_of(words[i] << 16), values[2 * i + 1] = hw::float_of(words[i] & 0xFFFF0000u);
        else values[2 * i] = numbers::float16_to_float(uint16_t(words[i])), values[2 * i + 1] = numbers::float16_to_float(uint16_t(words[i] >> 16));
    }
}

// Of bits without their sign: their order is that of the magnitudes, NaN above all.
QK_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <int INPUT>
QK_DEVICE uint32_t largest_of(const uint4& x, uint32_t largest) {
    float values[VECTOR<INPUT>];
    unpack<INPUT>(x, values);
#pragma unroll
    for (int i = 0; i < VECTOR<INPUT>; ++i) largest = larger(largest, hw::bits_of(values[i]) & 0x7FFFFFFFu);
    return largest;
}

template <int INPUT, int FORMAT>
QK_DEVICE void encode_vector(const uint4& x, const numbers::Divider& divide, uint8_t* codes) {
    float values[VECTOR<INPUT>];
    unpack<INPUT>(x, values);
    uint32_t words[VECTOR<INPUT> / 4] = {};
#pragma unroll
    for (int i = 0; i < VECTOR<INPUT>; ++i) words[i / 4] |= numbers::encode<FORMAT>(divide(values[i])) << (8 * (i % 4));
    if constexpr (VECTOR<INPUT> == 8) *reinterpret_cast<uint2*>(codes) = {words[0], words[1]};
    else *reinterpret_cast<uint32_t*>(codes) = words[0];
}

// One block of threads for each (row, group). VECTORS: groups begin and end on 16 bytes.
template <int INPUT, int FORMAT, bool VECTORS>
__global__ void __launch_bounds__(1024) quantize_long(const Rows r) {
    const int64_t row = blockIdx.x / r.groups, group = blockIdx.x % r.groups, first = group * r.group;
    const int64_t count = r.columns - first < r.group ? r.columns - first : r.group;
    const int64_t start = row * r.row_stride + first;
    uint8_t* const codes = r.codes + row * r.columns + first;
    const char* const bytes = static_cast<const char*>(r.values) + start * (INPUT == QK_FLOAT32 ? 4 : 2);
    uint4 held[HELD];
    uint32_t largest = 0;
    const int64_t vectors = VECTORS ? count / VECTOR<INPUT> : 0;
    if constexpr (VECTORS) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int64_t at = threadIdx.x + int64_t(i) * blockDim.x;
            held[i] = at < vectors ? hw::load_once(bytes + VECTOR_BYTES * at) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < HELD; ++i) largest = largest_of<INPUT>(held[i], largest);
        for (int64_t at = threadIdx.x + int64_t(HELD) * blockDim.x; at < vectors; at += blockDim.x)
            largest = largest_of<INPUT>(hw::load_cached(bytes + VECTOR_BYTES * at), largest);
    } else {
        for (int64_t at = threadIdx.x; at < count; at += blockDim.x)
            largest = larger(largest, hw::bits_of(numbers::load<INPUT>(r.values, start + at)) & 0x7FFFFFFFu);
    }
    uint32_t* const shared = reinterpret_cast<uint32_t*>(hw::shared_memory());  // [warps]
    for (int distance = 16; distance > 0; distance /= 2) largest = larger(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < int(blockDim.x / 32); ++warp) largest = larger(largest, shared[warp]);
    const float scale = numbers::choose_scale<FORMAT>(hw::float_of(largest), r.rule);
    if (threadIdx.x == 0) r.scale[row * r.groups + group] = scale;
    const numbers::Divider divide(scale);
    if constexpr (VECTORS) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int64_t at = threadIdx.x + int64_t(i) * blockDim.x;
            if (at < vectors) encode_vector<INPUT, FORMAT>(held[i], divide, codes + VECTOR<INPUT> * at);
        }
        for (int64_t at = threadIdx.x + int64_t(HELD) * blockDim.x; at < vectors; at += blockDim.x)
            encode_vector<INPUT, FORMAT>(hw::load_cached(bytes + VECTOR_BYTES * at), divide, codes + VECTOR<INPUT> * at);
    } else {
        for (int64_t at = threadIdx.x; at < count; at += blockDim.x) codes[at] = uint8_t(numbers::encode<FORMAT>(divide(numbers::load<INPUT>(r.values, start + at))));
    }
}

// LANES neighbouring lanes for each group of LANES vectors; a row is whole groups, and one block of threads: no index needs a division.
template <int INPUT, int FORMAT, int LANES>
__global__ void __launch_bounds__(256) quantize_groups(const Rows r) {
    const int64_t row = blockIdx.x;
    const int vectors = int(r.columns / VECTOR<INPUT>);
    const char* const bytes = static_cast<const char*>(r.values) + row * r.row_stride * (INPUT == QK_FLOAT32 ? 4 : 2);
#pragma unroll 2
    for (int first = 0; first < vectors; first += int(blockDim.x)) {
        const int at = first + int(threadIdx.x);
        const bool is_there = at < vectors;  // all lanes take part in the exchange below
        const uint4 x = is_there ? hw::load_once(bytes + VECTOR_BYTES * int64_t(at)) : uint4{0, 0, 0, 0};
        uint32_t largest = largest_of<INPUT>(x, 0);
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) largest = larger(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
        if (!is_there) continue;
        const float scale = numbers::choose_scale<FORMAT>(hw::float_of(largest), r.rule);
        if (at % LANES == 0) r.scale[row * r.groups + at / LANES] = scale;
        encode_vector<INPUT, FORMAT>(x, numbers::Divider(scale), r.codes + row * r.columns + VECTOR<INPUT> * int64_t(at));
    }
}

template <int INPUT, int FORMAT>
int launch(const Rows& r, void* stream) {
    constexpr int64_t VECTOR_ELEMENTS = VECTOR<INPUT>, ELEMENT = INPUT == QK_FLOAT32 ? 4 : 2;
    const auto is_aligned = [](const void* pointer, int64_t size) { return reinterpret_cast<uintptr_t>(pointer) % size == 0; };
    const bool vectors = is_aligned(r.values, VECTOR_BYTES) && is_aligned(r.codes, VECTOR_ELEMENTS) && r.row_stride * ELEMENT % VECTOR_BYTES == 0 &&
                         r.columns % VECTOR_ELEMENTS == 0 && r.group % VECTOR_ELEMENTS == 0;
    const int64_t lanes = r.group / VECTOR_ELEMENTS;
    if (vectors && r.columns % r.group == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32)) {
        const int64_t of_row = r.columns / VECTOR_ELEMENTS;
        if (r.rows >= int64_t(1) << 31 || of_row >= int64_t(1) << 30) return -1;
        const hw::Grid grid{unsigned(r.rows), 1, 1};
        const int threads = of_row >= 256 ? 256 : int((of_row + 31) / 32 * 32);
        if (lanes == 4) return hw::launch(quantize_groups<INPUT, FORMAT, 4>, grid, threads, 0, stream, r);
        if (lanes == 8) return hw::launch(quantize_groups<INPUT, FORMAT, 8>, grid, threads, 0, stream, r);
        if (lanes == 16) return hw::launch(quantize_groups<INPUT, FORMAT, 16>, grid, threads, 0, stream, r);
        return hw::launch(quantize_groups<INPUT, FORMAT, 32>, grid, threads, 0, stream, r);
    }
    if (r.rows * r.groups >= int64_t(1) << 31) return -1;
    const hw::Grid grid{unsigned(r.rows * r.groups), 1, 1};
    const int64_t most = vectors ? (lanes + HELD - 1) / HELD : r.group;  // threads that find work
    const int threads = most >= 1024 ? 1024 : most <= 32 ? 32 : int((most + 31) / 32 * 32);
    const size_t shared = threads / 32 * sizeof(uint32_t);
    if (vectors) return hw::launch(quantize_long<INPUT, FORMAT, true>, grid, threads, shared, stream, r);
    return hw::launch(quantize_long<INPUT, FORMAT, false>, grid, threads, shared, stream, r);
}

}  // namespace

// values: [rows, columns] of `input`, rows row_stride elements apart; scale: [rows, groups] float32; codes: [rows, columns] bytes, dense.
// Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_quantize_rows(const void* values, int input, int64_t rows, int64_t columns, int64_t row_stride, int64_t group, int format, int rule,
                                     float* scale, void* codes, void* stream) {
    if (rows < 1 || columns < 1 || row_stride < (rows > 1 ? columns : 0) || group < 1 || rule < 0 || rule >= QK_SCALE_RULES) return -1;
    if (input < 0 || input >= QK_INPUTS || format < 0 || format >= QK_FORMATS) return -1;
    group = group < columns ? group : columns;
    const Rows r{values, rows, columns, row_stride, group, (columns + group - 1) / group, rule, scale, static_cast<uint8_t*>(codes)};
    if (format == QK_INT8) {
        return input == QK_BFLOAT16  ? launch<QK_BFLOAT16, QK_INT8>(r, stream)
               : input == QK_FLOAT16 ? launch<QK_FLOAT16, QK_INT8>(r, stream)
                                     : launch<QK_FLOAT32, QK_INT8>(r, stream);
    }
    return input == QK_BFLOAT16  ? launch<QK_BFLOAT16, QK_E4M3>(r, stream)
           : input == QK_FLOAT16 ? launch<QK_FLOAT16, QK_E4M3>(r, stream)
                                 : launch<QK_FLOAT32, QK_E4M3>(r, stream);
}
