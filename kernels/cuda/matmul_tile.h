// output[m][n] = finish( sum_k a[m][k] w[n][k] ) in tiles of tokens x 128 output features, with mma.sync and cp.async: sm_80 and all after it.
//
// Four stages of 64 input features in shared memory are filled ahead of the multiplication. Eight warps, two along the tokens and four along the features,
// hold their part of the tile's sums in registers. Tokens are the rows of mma.sync. Where scales change along K, each group has sums of its own, which
// are scaled and added to the totals at its end.
#pragma once

#include <type_traits>

#include "operands.h"

namespace tile {

constexpr int WARPS_DOWN = 2, WARPS_ACROSS = 4, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
constexpr int FEATURES = 128, FEATURES_OF_WARP = FEATURES / WARPS_ACROSS, COLUMNS = FEATURES_OF_WARP / 8;
constexpr int DEPTH = 64, STAGES = 4;  // 96 KB with bfloat16 activations and 128 tokens: what sm_89 and sm_120 have
constexpr int WEIGHT_BYTES = FEATURES * DEPTH;

// Where 16-byte chunk c of row r lies, so that eight rows read at the same c (ldmatrix) touch every bank once: of rows of 64 bytes, and of 128 where half-warps
// read two chunks of four rows.
QK_DEVICE int place_in_64(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }
QK_DEVICE int place_in_128(int row, int chunk) { return row * 128 + ((chunk ^ ((row & 3) << 1)) << 4); }

template <class Operands, int TOKENS>
struct Stages {
    static constexpr int ROW_BYTES = DEPTH * Operands::ACTIVATION_BYTES, ACTIVATION_BYTES = TOKENS * ROW_BYTES;
    static constexpr int BYTES = ACTIVATION_BYTES + WEIGHT_BYTES;

    // Starts this thread's share of the copies of one stage. Rows and input features beyond the end become zeros.
    QK_DEVICE static void fill(const Product& p, char* stage, int first_token, int first_feature, int k) {
#pragma unroll
        for (int i = threadIdx.x; i < ACTIVATION_BYTES / 16; i += THREADS) {
            constexpr int CHUNKS = ROW_BYTES / 16;
            const int row = i / CHUNKS, chunk = i % CHUNKS, token = first_token + row;
            const bool valid = token < p.tokens && k * Operands::ACTIVATION_BYTES + 16 * chunk < p.inner * Operands::ACTIVATION_BYTES;
            const char* from = static_cast<const char*>(p.activations) + (valid ? (token * p.row_stride + k) * Operands::ACTIVATION_BYTES + 16 * chunk : 0);
            hw::copy_async(stage + (ROW_BYTES == 64 ? place_in_64(row, chunk) : place_in_128(row, chunk)), from, valid);
        }
#pragma unroll
        for (int i = threadIdx.x; i < WEIGHT_BYTES / 16; i += THREADS) {
            const int row = i / 4, chunk = i % 4, feature = first_feature + row;
            const bool valid = feature < p.features && k + 16 * chunk < p.inner;
            hw::copy_async(stage + ACTIVATION_BYTES + place_in_64(row, chunk), p.weight + (valid ? int64_t(feature) * p.inner + k + 16 * chunk : 0), valid);
        }
    }
};

// Adds 32 input features, the `half`-th of a stage, to a warp's sums of ROWS x 16 tokens and COLUMNS x 8 features.
template <class Operands, int ROWS>
QK_DEVICE void multiply_half(const char* activations, const char* weight, int half, typename Operands::Sum (&sums)[ROWS][COLUMNS][4]) {
    const int lane = threadIdx.x % 32;
    uint32_t codes[COLUMNS][2];
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 2) {
        uint32_t x[4];  // two columns of 8 features, two chunks of 16 input features each
        const int row = 8 * column + lane % 8 + lane / 16 * 8;
        hw::load_matrices(x, weight + place_in_64(row, 2 * half + lane / 8 % 2));
        codes[column][0] = x[0], codes[column][1] = x[1], codes[column + 1][0] = x[2], codes[column + 1][1] = x[3];
    }
    if constexpr (Operands::ACTIVATION_BYTES == 1) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            uint32_t a[4];
            hw::load_matrices(a, activations + place_in_64(16 * row + lane % 16, 2 * half + lane / 16));
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) Operands::multiply(sums[row][column], a, codes[column][0], codes[column][1]);
        }
    } else {
        // The codes of lane 4 g + t are those at 4 t .. 4 t + 3 and 16 more: so the activations are read from there.
        uint2 a[ROWS][2][2];
        const int t = lane % 4;
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
#pragma unroll
            for (int lower = 0; lower < 2; ++lower)
#pragma unroll
                for (int later = 0; later < 2; ++later)
                    a[row][lower][later] = *reinterpret_cast<const uint2*>(
                        activations + place_in_128(16 * row + 8 * lower + lane / 4, 4 * half + 2 * later + t / 2) + 8 * (t % 2));
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const uint32_t first[2] = {Operands::pair_or_nan(codes[column][0], true), Operands::pair_or_nan(codes[column][1], true)};
            const uint32_t second[2] = {Operands::pair_or_nan(codes[column][0], false), Operands::pair_or_nan(codes[column][1], false)};
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const uint32_t x[4] = {a[row][0][0].x, a[row][1][0].x, a[row][0][1].x, a[row][1][1].x};
                const uint32_t y[4] = {a[row][0][0].y, a[row][1][0].y, a[row][0][1].y, a[row][1][1].y};
                hw::mma_bfloat16(sums[row][column], x, first[0], first[1]);
                hw::mma_bfloat16(sums[row][column], y, second[0], second[1]);
            }
        }
    }
}

// Two neighbouring outputs of a token.
QK_DEVICE void store_pair(const Product& p, int token, int feature, float left, float right) {
    if (p.features % 2 == 0 && p.output_type != QK_FLOAT32) {
        static_cast<uint32_t*>(p.output)[(int64_t(token) * p.features + feature) / 2] = numbers::narrow_pair(p.output_type, left, right);
        return;
    }
    multiply::store(p, token, feature, left);
    if (feature + 1 < p.features) multiply::store(p, token, feature + 1, right);
}

template <class Operands, int TOKENS, bool GROUPED>
__global__ void __launch_bounds__(THREADS, 1) matmul(const Product p) {
    using Sum = typename Operands::Sum;
    using Stage = Stages<Operands, TOKENS>;
    constexpr int TOKENS_OF_WARP = TOKENS / WARPS_DOWN, ROWS = TOKENS_OF_WARP / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, down = warp % WARPS_DOWN, across = warp / WARPS_DOWN;
    const int first_token = blockIdx.x * TOKENS, first_feature = blockIdx.y * FEATURES;
    const int own_token = first_token + down * TOKENS_OF_WARP, own_feature = first_feature + across * FEATURES_OF_WARP;
    const int steps = (p.inner + DEPTH - 1) / DEPTH;
    char* const shared = hw::shared_memory();

    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) Stage::fill(p, shared + step * Stage::BYTES, first_token, first_feature, step * DEPTH);
        hw::copy_async_commit();  // empty groups keep the count
    }
    Sum sums[ROWS][COLUMNS][4] = {};
    float totals[GROUPED ? ROWS : 1][GROUPED ? COLUMNS : 1][4] = {};
    for (int step = 0; step < steps; ++step) {
        hw::copy_async_wait<STAGES - 2>();
        __syncthreads();  // the stage is there for all; all are done with the one before, which is filled now
        const int next = step + STAGES - 1;
        if (next < steps) Stage::fill(p, shared + next % STAGES * Stage::BYTES, first_token, first_feature, next * DEPTH);
        hw::copy_async_commit();
        const char* stage = shared + step % STAGES * Stage::BYTES;
        const char* activations = stage + down * TOKENS_OF_WARP * Stage::ROW_BYTES;
        const char* weight = stage + Stage::ACTIVATION_BYTES + across * FEATURES_OF_WARP * DEPTH;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            multiply_half<Operands, ROWS>(activations, weight, half, sums);
            if constexpr (GROUPED) {
                const int done = step * DEPTH + 32 * (half + 1), group = (done - 1) / p.group;
                if (done % p.group != 0 && done < p.inner) continue;  // a group is a multiple of 32
                if (done >= p.inner + 32) continue;                   // nothing but zeros: the last group has been added
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const int feature = own_feature + 8 * column + 2 * (lane % 4) + side;
                        const float weight_scale = feature < p.features ? p.scale_of_feature(feature, group) : 0.0f;
#pragma unroll
                        for (int row = 0; row < ROWS; ++row)
#pragma unroll
                            for (int lower = 0; lower < 2; ++lower) {
                                const int token = own_token + 16 * row + 8 * lower + lane / 4;
                                const float scale = weight_scale * (token < p.tokens ? p.scale_of_token(token, group) : 0.0f);
                                totals[row][column][2 * lower + side] += float(sums[row][column][2 * lower + side]) * scale;
                                sums[row][column][2 * lower + side] = 0;
                            }
                    }
            }
        }
    }
    multiply::TokenSide tokens[ROWS][2];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) tokens[row][lower] = multiply::token_side(p, own_token + 16 * row + 8 * lower + lane / 4);
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
        const int feature = own_feature + 8 * column + 2 * (lane % 4);
        const multiply::FeatureSide left = multiply::feature_side(p, feature), right = multiply::feature_side(p, feature + 1);
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int token = own_token + 16 * row + 8 * lower + lane / 4;
                if (token >= p.tokens || feature >= p.features) continue;
                const auto sum = [&](int side) {
                    if constexpr (GROUPED) return totals[row][column][2 * lower + side];
                    else return sums[row][column][2 * lower + side];
                };
                store_pair(p, token, feature, multiply::finished(sum(0), tokens[row][lower], left), multiply::finished(sum(1), tokens[row][lower], right));
            }
    }
}

// 64 tokens where there are no more, 128 else; groups, which are rare here, in one size.
template <class Operands>
int launch(const Product& p, void* stream) {
    const auto run = [&](auto kernel, int tokens, int bytes) {
        const hw::Grid grid{unsigned(multiply::count_of(p.tokens, tokens)), unsigned(multiply::count_of(p.features, FEATURES)), 1};
        return hw::launch(kernel, grid, THREADS, size_t(STAGES) * bytes, stream, p);
    };
    if (p.is_grouped()) return run(matmul<Operands, 128, true>, 128, Stages<Operands, 128>::BYTES);
    if (p.tokens > 64) return run(matmul<Operands, 128, false>, 128, Stages<Operands, 128>::BYTES);
    return run(matmul<Operands, 64, false>, 64, Stages<Operands, 64>::BYTES);
}

}  // namespace tile
