// output[m][n] = finish( sum_k a[m][k] w[n][k] ) for at most 16 tokens: each weight is read once, from memory straight into registers.
//
// A block of threads has 32 output features; its warps share K and add their sums at the end, in the same order always. Weights are the rows of
// mma.sync, tokens its columns. Lane 4 g + t loads bytes 16 t .. 16 t + 15 of 64 of row g: four words, which stand for other places in K than the
// instruction's, but the activations' are loaded from the same places. Activations are read again by every block, out of the L1 and L2 caches.
#pragma once

#include <type_traits>

#include "operands.h"

namespace decode {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TALL = 2, FEATURES = 16 * TALL;  // of a block: 16 would read activations twice as often, 64 leave multiprocessors without work at 4096 features
constexpr int DEPTH = 64;                      // input features of one step: 16 bytes for each lane of four
constexpr int MOST_TOKENS = 16;
constexpr int PITCH = FEATURES + 1;  // of the sums in shared memory: one more, for other banks

// One step's loads. weight: rows g and g + 8 of each 16.
template <class Operands, int BLOCKS>
struct Step {
    uint4 weight[TALL][2];
    uint4 activation[BLOCKS][Operands::ACTIVATION_BYTES];

    QK_DEVICE void load(const Product& p, int first_feature, int k) {
        const int lane = threadIdx.x % 32, row = lane / 4;
        k += 16 * (lane % 4);
        const bool inside = k < p.inner;  // inner is a multiple of 16
        for (int tall = 0; tall < TALL; ++tall)
            for (int half = 0; half < 2; ++half) {
                int feature = first_feature + 16 * tall + 8 * half + row;
                feature = feature < p.features ? feature : p.features - 1;  // read again rather than beyond the end; its sums are not stored
                weight[tall][half] = inside ? hw::load_once(p.weight + int64_t(feature) * p.inner + k) : uint4{0, 0, 0, 0};
            }
        for (int block = 0; block < BLOCKS; ++block) {
            const int token = 8 * block + row;
            const char* from = static_cast<const char*>(p.activations) + (token * p.row_stride + k) * Operands::ACTIVATION_BYTES;
            for (int part = 0; part < Operands::ACTIVATION_BYTES; ++part)
                activation[block][part] = inside && token < p.tokens ? hw::load_cached(from + 16 * part) : uint4{0, 0, 0, 0};
        }
    }
};

// nan[tall][half]: a top bit is set where a weight of that row was NaN, which the conversion takes for 480.
template <class Operands, int BLOCKS, class Sum>
QK_DEVICE void multiply_step(const Step<Operands, BLOCKS>& step, Sum (&sums)[TALL][BLOCKS][4], uint32_t (&nan)[TALL][2]) {
#pragma unroll
    for (int tall = 0; tall < TALL; ++tall) {
        const uint4 upper = step.weight[tall][0], lower = step.weight[tall][1];
        const uint32_t w[4] = {upper.x, upper.y, upper.z, upper.w}, v[4] = {lower.x, lower.y, lower.z, lower.w};
        if constexpr (Operands::ACTIVATION_BYTES == 1) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t fragment[4] = {w[2 * half], v[2 * half], w[2 * half + 1], v[2 * half + 1]};
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const uint4 x = step.activation[block][0];
                    Operands::multiply(sums[tall][block], fragment, half ? x.z : x.x, half ? x.w : x.y);
                }
            }
        } else {
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const uint32_t fragment[4] = {Operands::pair(w[word], true), Operands::pair(v[word], true), Operands::pair(w[word], false),
                                              Operands::pair(v[word], false)};
                if (Operands::HAS_NAN) {
                    nan[tall][0] |= (w[word] & 0x7F7F7F7Fu) + 0x01010101u;
                    nan[tall][1] |= (v[word] & 0x7F7F7F7Fu) + 0x01010101u;
                }
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const uint4 x = step.activation[block][word / 2];
                    hw::mma_bfloat16(sums[tall][block], fragment, word % 2 ? x.z : x.x, word % 2 ? x.w : x.y);
                }
            }
        }
    }
}

// The group's sums times its scales, added to the totals. Lane 4 g + t holds features g and g + 8 of tokens 2 t and 2 t + 1.
template <int BLOCKS, class Sum>
QK_DEVICE void add_group(const Product& p, const Sum (&sums)[TALL][BLOCKS][4], float (&totals)[TALL][BLOCKS][4], int first_feature, int group) {
    const int lane = threadIdx.x % 32;
    for (int tall = 0; tall < TALL; ++tall)
        for (int half = 0; half < 2; ++half) {
            const int feature = first_feature + 16 * tall + 8 * half + lane / 4;
            const float scale = p.scale_of_feature(feature < p.features ? feature : p.features - 1, group);
            for (int block = 0; block < BLOCKS; ++block)
                for (int side = 0; side < 2; ++side) {
                    const int token = 8 * block + 2 * (lane % 4) + side;
                    const float both = scale * (token < p.tokens ? p.scale_of_token(token, group) : 0.0f);
                    totals[tall][block][2 * half + side] += float(sums[tall][block][2 * half + side]) * both;
                }
        }
}

// Two blocks on a multiprocessor have 128 registers a thread, which groups of 16 tokens don't do with.
template <class Operands, int BLOCKS, bool GROUPED>
__global__ void __launch_bounds__(THREADS, GROUPED && BLOCKS == 2 ? 1 : 2) matmul(const Product p) {
    using Sum = typename Operands::Sum;
    using Total = std::conditional_t<GROUPED, float, Sum>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_feature = blockIdx.x * FEATURES;
    Total totals[TALL][BLOCKS][4] = {};
    uint32_t nan[TALL][2] = {};

    const auto multiply = [&](const Step<Operands, BLOCKS>& step, int k) {
        if constexpr (GROUPED) {
            Sum sums[TALL][BLOCKS][4] = {};
            multiply_step(step, sums, nan);
            add_group<BLOCKS>(p, sums, totals, first_feature, k / p.group);  // a group is a multiple of a step
        } else {
            multiply_step(step, totals, nan);
        }
    };
    // While one step is multiplied the other is on its way.
    Step<Operands, BLOCKS> even, odd;
    constexpr int STRIDE = WARPS * DEPTH;
    int k = warp * DEPTH;
    even.load(p, first_feature, k);
    while (k < p.inner) {
        odd.load(p, first_feature, k + STRIDE);
        multiply(even, k);
        k += STRIDE;
        if (k >= p.inner) break;
        even.load(p, first_feature, k + STRIDE);
        multiply(odd, k);
        k += STRIDE;
    }
    if constexpr (Operands::ACTIVATION_BYTES == 2) {
        if (Operands::HAS_NAN) {
            for (int tall = 0; tall < TALL; ++tall)
                for (int half = 0; half < 2; ++half) {
                    // The four lanes of a row have read different parts of it.
                    uint32_t found = nan[tall][half];
                    found |= __shfl_xor_sync(0xFFFFFFFFu, found, 1);
                    found |= __shfl_xor_sync(0xFFFFFFFFu, found, 2);
                    if (found & 0x80808080u)
                        for (int block = 0; block < BLOCKS; ++block) totals[tall][block][2 * half] = totals[tall][block][2 * half + 1] = hw::float_of(0x7FC00000u);
                }
        }
    }

    Total* shared = reinterpret_cast<Total*>(hw::shared_memory());  // [WARPS][8 * BLOCKS tokens][PITCH]
    for (int tall = 0; tall < TALL; ++tall)
        for (int block = 0; block < BLOCKS; ++block)
            for (int i = 0; i < 4; ++i) {
                const int token = 8 * block + 2 * (lane % 4) + i % 2, feature = 16 * tall + 8 * (i / 2) + lane / 4;
                shared[(warp * 8 * BLOCKS + token) * PITCH + feature] = totals[tall][block][i];
            }
    __syncthreads();
    for (int token = warp; token < 8 * BLOCKS && token < p.tokens; token += WARPS) {
        if (first_feature + lane >= p.features) continue;
        Total sum = 0;
        for (int part = 0; part < WARPS; ++part) sum += shared[(part * 8 * BLOCKS + token) * PITCH + lane];
        const int feature = first_feature + lane;
        multiply::store(p, token, feature, multiply::finished(sum, multiply::token_side(p, token), multiply::feature_side(p, feature)));
    }
}

// At most MOST_TOKENS; a group is all of K or a multiple of DEPTH.
inline bool takes(const Product& p) { return p.tokens <= MOST_TOKENS && (!p.is_grouped() || p.group % DEPTH == 0); }

template <class Operands>
int launch(const Product& p, void* stream) {
    const hw::Grid grid{unsigned(::multiply::count_of(p.features, FEATURES)), 1, 1};
    const auto run = [&](auto kernel, int blocks) { return hw::launch(kernel, grid, THREADS, size_t(WARPS) * 8 * blocks * PITCH * 4, stream, p); };
    if (p.is_grouped()) return p.tokens > 8 ? run(matmul<Operands, 2, true>, 2) : run(matmul<Operands, 1, true>, 1);
    return p.tokens > 8 ? run(matmul<Operands, 2, false>, 2) : run(matmul<Operands, 1, false>, 1);
}

}  // namespace decode
