// code[b][h][t][d] = cast(clamp(round(x[b][h][t][d] / scale[h]))): keys and values, or any matrix, by static scales, one for all or one for each head.
//
// Bit for bit equal to quantkit/ops/reference.py: quantize, given the scale. Each thread encodes 16 bytes of input.

#include "numbers.h"

namespace {

struct States {
    const void* values;  // [outer, heads, tokens, width], the last dimension dense, the others with steps in elements
    int64_t outer, heads, tokens, width;
    int64_t outer_step, head_step, token_step;
    const float* scale;
    int64_t scale_step;  // from one head's scale to the next: 0 or 1
    uint8_t* codes;      // the same shape, dense
};

// VECTOR: elements that a thread encodes; 16 bytes of them where all is aligned to that, one else. Blocks: x for each head of each outer index, y along its
// tokens. Divisions, which would cost more than the memory, are left to rows that are not dense, in 32 bits where those do.
template <int INPUT, int FORMAT, int VECTOR>
__global__ void __launch_bounds__(256) encode(const States s) {
    const int64_t pair = blockIdx.x, head = pair % s.heads, outer = pair / s.heads, of_row = s.width / VECTOR, count = s.tokens * of_row;
    const int64_t base = outer * s.outer_step + head * s.head_step;
    const bool is_dense = s.token_step == s.width, is_short = count < int64_t(1) << 32;
    const numbers::Divider divide(s.scale[head * s.scale_step]);
    for (int64_t at = blockIdx.y * int64_t(blockDim.x) + threadIdx.x; at < count; at += int64_t(gridDim.y) * blockDim.x) {
        const int64_t token = is_dense ? 0 : is_short ? int64_t(uint32_t(at) / uint32_t(of_row)) : at / of_row;
        const int64_t from = base + token * s.token_step + (at - token * of_row) * VECTOR, i = pair * count + at;
        if constexpr (VECTOR == 1) {
            s.codes[i] = uint8_t(numbers::encode<FORMAT>(divide(numbers::load<INPUT>(s.values, from))));
        } else {
            const uint4 x = hw::load_once(static_cast<const char*>(s.values) + from * (16 / VECTOR));
            const uint32_t words[4] = {x.x, x.y, x.z, x.w};
            uint32_t codes[VECTOR / 4] = {};
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const uint32_t word = words[j * 4 / VECTOR];
                const float value = INPUT == QK_FLOAT32    ? hw::float_of(word)
                                    : INPUT == QK_BFLOAT16 ? numbers::bfloat16_to_float(uint16_t(word >> 16 * (j % 2)))
                                                           : numbers::float16_to_float(uint16_t(word >> 16 * (j % 2)));
                codes[j / 4] |= numbers::encode<FORMAT>(divide(value)) << (8 * (j % 4));
            }
            if constexpr (VECTOR == 8) reinterpret_cast<uint2*>(s.codes)[i] = {codes[0], codes[1]};
            else reinterpret_cast<uint32_t*>(s.codes)[i] = codes[0];
        }
    }
}

template <int INPUT, int FORMAT>
int launch(const States& s, void* stream) {
    constexpr int VECTOR = INPUT == QK_FLOAT32 ? 4 : 8;
    const bool aligned = reinterpret_cast<uintptr_t>(s.values) % 16 == 0 && reinterpret_cast<uintptr_t>(s.codes) % VECTOR == 0 && s.width % VECTOR == 0 &&
                         s.outer_step % VECTOR == 0 && s.head_step % VECTOR == 0 && s.token_step % VECTOR == 0;
    const int64_t pairs = s.outer * s.heads, blocks = (s.tokens * s.width / (aligned ? VECTOR : 1) + 255) / 256;
    if (pairs >= int64_t(1) << 31) return -1;
    const hw::Grid grid{unsigned(pairs), unsigned(blocks < 65535 ? blocks : 65535), 1};  // 65535: the most that y takes; threads go on from there
    if (aligned) return hw::launch(encode<INPUT, FORMAT, VECTOR>, grid, 256, 0, stream, s);
    return hw::launch(encode<INPUT, FORMAT, 1>, grid, 256, 0, stream, s);
}

}  // namespace

// values: [outer, heads, tokens, width] of `input`, with steps in elements; scale: float32, scale_step 0 (one) or 1 (one for each head); codes: bytes, dense.
// Returns 0, -1 for arguments that make no sense, or CUDA's error.
extern "C" int qk_cuda_quantize_kv(const void* values, int input, int64_t outer, int64_t heads, int64_t tokens, int64_t width, int64_t outer_step,
                                   int64_t head_step, int64_t token_step, const float* scale, int64_t scale_step, int format, void* codes, void* stream) {
    if (outer < 1 || heads < 1 || tokens < 1 || width < 1 || outer_step < 0 || head_step < 0 || token_step < 0 || scale_step < 0 || scale_step > 1) return -1;
    if (input < 0 || input >= QK_INPUTS || format < 0 || format >= QK_FORMATS) return -1;
    const States s{values, outer, heads, tokens, width, outer_step, head_step, token_step, scale, scale_step, static_cast<uint8_t*>(codes)};
    if (format == QK_INT8) {
        return input == QK_BFLOAT16  ? launch<QK_BFLOAT16, QK_INT8>(s, stream)
               : input == QK_FLOAT16 ? launch<QK_FLOAT16, QK_INT8>(s, stream)
                                     : launch<QK_FLOAT32, QK_INT8>(s, stream);
    }
    return input == QK_BFLOAT16  ? launch<QK_BFLOAT16, QK_E4M3>(s, stream)
           : input == QK_FLOAT16 ? launch<QK_FLOAT16, QK_E4M3>(s, stream)
                                 : launch<QK_FLOAT32, QK_E4M3>(s, stream);
}
