// output[m][n] = finish( sum_k a[m][k] w[n][k] ) on Hopper (sm_90a): wgmma fed by the copy engine, in a persistent grid whose warpgroups have roles.
//
// Of a block's three warpgroups the first copies: one of its threads asks for boxes of 128 bytes of K of both operands, STAGES ahead. The other two multiply, each
// its half of the tile's left rows by all of its right rows. Barriers in shared memory say that a stage is full (its bytes have come) and empty (all eight
// multiplying warps are done with it). The grid is as large as the device; each block takes every so manieth tile.
//
// wgmma's left side has 64 rows. With many tokens, tokens are on the left; with at most 64, weights are ("swapped"), and the right side is as narrow as the tokens.
// Hopper adds FP8 products to a sum with fewer bits than float32's; so a sum of FP8 runs over 128 of K and is then added to a float32 total, with the
// scales of its group where there are groups. INT8 sums are exact and run over all of K.
#pragma once

#include "multiply.h"

namespace wgmma_tile {

constexpr int THREADS = 384, DEPTH = 128;  // codes of K of a stage: as wide as the swizzle
constexpr int MOST_SWAPPED_TOKENS = 64;
// 65536 registers: 128 threads x 40 + 256 x 232.
constexpr int COPYING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;

struct Int8 {
    using Sum = int32_t;
};
struct E4M3 {
    using Sum = float;
};

// LEFT: 64-row halves of each multiplying warpgroup. RIGHT: right rows of a tile.
template <int LEFT, int RIGHT>
struct Shape {
    static constexpr int LEFT_ROWS = 128 * LEFT, LEFT_BYTES = LEFT_ROWS * DEPTH, RIGHT_BYTES = RIGHT * DEPTH, STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
    static constexpr int STAGES = 196608 / STAGE_BYTES < 8 ? 196608 / STAGE_BYTES : 8;  // of the 227 KB that a block can have
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 16 * STAGES;             // and two barriers for each stage
    static constexpr bool SWAPPED = RIGHT < 128;
};

// Tiles in bands of eight to the left, band after band: what runs at one time shares rows of both sides in the L2 cache.
struct Place {
    int left, right;
};
QK_DEVICE Place place_of(int tile, int left_tiles, int right_tiles) {
    constexpr int BAND = 8;
    const int band = tile / (BAND * right_tiles), within = tile - band * BAND * right_tiles;
    const int height = left_tiles - BAND * band < BAND ? left_tiles - BAND * band : BAND;
    return {BAND * band + within % height, within / height};
}

#if QK_HAS_WGMMA

// Words of four lanes: lane t gives its word of blocks 0 .. 3 and gets those of block t from all four, in the order of the lanes.
QK_DEVICE void transpose_quad(uint32_t (&x)[4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int low = 0; low < 4; ++low) {
            if (low & bit) continue;
            const uint32_t sent = t & bit ? x[low] : x[low | bit];
            const uint32_t came = __shfl_xor_sync(0xFFFFFFFFu, sent, bit);
            if (t & bit) x[low] = came;
            else x[low | bit] = came;
        }
    }
}

// A token's outputs of four blocks of 8 features, of which each of four lanes has two, 16 bytes a lane: the lanes' pairs change places. feature: of the lane's store.
QK_DEVICE void store_wide(const Product& p, int token, int feature, const float (&values)[4][2]) {
    uint32_t pairs[4];
#pragma unroll
    for (int block = 0; block < 4; ++block) pairs[block] = numbers::narrow_pair(p.output_type, values[block][0], values[block][1]);
    transpose_quad(pairs);
    if (token < p.tokens && feature < p.features)
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.output) + int64_t(token) * p.features + feature) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// The same one by one, for float32 and where rows don't begin on 16 bytes. feature: of the lane's first value.
QK_DEVICE void store_narrow(const Product& p, int token, int feature, const float (&values)[4][2]) {
    if (token >= p.tokens) return;
#pragma unroll 1
    for (int block = 0; block < 4; ++block) {
        // Chosen instead of indexed: registers have no index.
        const float left = block == 0 ? values[0][0] : block == 1 ? values[1][0] : block == 2 ? values[2][0] : values[3][0];
        const float right = block == 0 ? values[0][1] : block == 1 ? values[1][1] : block == 2 ? values[2][1] : values[3][1];
        if (feature + 8 * block < p.features) multiply::store(p, token, feature + 8 * block, left);
        if (feature + 8 * block + 1 < p.features) multiply::store(p, token, feature + 8 * block + 1, right);
    }
}

// The thread's sums of 64 left rows that begin at left_row, by RIGHT right rows from right_row on. Lane 4 g + t of warp w has left rows 16 w + g and, in
// elements 2 and 3 of four, 8 more; right rows 8 j + 2 t and one more, in elements 4 j ...
template <bool SWAPPED, class Sum, int COUNT>
QK_DEVICE void write(const Product& p, const Sum (&sums)[COUNT], int left_row, int right_row) {
    const int lane = threadIdx.x % 32, t = lane % 4, row = left_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
    if constexpr (SWAPPED) {
        const multiply::FeatureSide features[2] = {multiply::feature_side(p, row), multiply::feature_side(p, row + 8)};
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int token = right_row + i / 4 * 8 + 2 * t + i % 2, lower = i / 2 % 2, feature = row + 8 * lower;
            if (token < p.tokens && feature < p.features) multiply::store(p, token, feature, multiply::finished(sums[i], multiply::token_side(p, token), features[lower]));
        }
    } else {
        const multiply::TokenSide tokens[2] = {multiply::token_side(p, row), multiply::token_side(p, row + 8)};
        const bool is_wide = p.features % 8 == 0 && p.output_type != QK_FLOAT32;
#pragma unroll
        for (int first = 0; first < COUNT / 4; first += 4) {
            multiply::FeatureSide features[4][2];
#pragma unroll
            for (int i = 0; i < 8; ++i) features[i / 2][i % 2] = multiply::feature_side(p, right_row + 8 * (first + i / 2) + 2 * t + i % 2);
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int token = row + 8 * lower;
                float values[4][2];
#pragma unroll
                for (int i = 0; i < 8; ++i) values[i / 2][i % 2] = multiply::finished(sums[4 * (first + i / 2) + 2 * lower + i % 2], tokens[lower], features[i / 2][i % 2]);
                if (is_wide) store_wide(p, token, right_row + 8 * (first + t), values);
                else store_narrow(p, token, right_row + 8 * first + 2 * t, values);
            }
        }
    }
}

// The scales of one group that a thread needs: of its tokens, times that of the weights, of which one serves the tile (scale_columns is 128).
template <bool SWAPPED, int LEFT, int COUNT>
struct GroupScales {
    static constexpr int TOKENS = SWAPPED ? COUNT / 2 : 2 * LEFT;
    float of_token[TOKENS], of_weight;

    QK_DEVICE void load(const Product& p, int left_row, int right_row, int group) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            const int token = SWAPPED ? right_row + 8 * (i / 2) + 2 * (lane % 4) + i % 2 : left_row + 64 * (i / 2) + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * (i % 2);
            of_token[i] = p.scale_of_token(token < p.tokens ? token : p.tokens - 1, group);
        }
        const int feature = SWAPPED ? left_row : right_row;
        of_weight = p.scale_of_feature(feature < p.features ? feature : p.features - 1, group);
    }
    // Of element i of the sums of a half: elements 2 and 3 of four are 8 left rows further.
    QK_DEVICE float of(int half, int i) const { return of_weight * of_token[SWAPPED ? i / 4 * 2 + i % 2 : 2 * half + i / 2 % 2]; }
};

#endif

template <class Operands, int LEFT, int RIGHT, bool GROUPED>
__global__ void __launch_bounds__(THREADS, 1) matmul(const Product p, const __grid_constant__ hw::TensorMap left_map, const __grid_constant__ hw::TensorMap right_map) {
#if QK_HAS_WGMMA
    using Sum = typename Operands::Sum;
    using S = Shape<LEFT, RIGHT>;
    constexpr bool IS_FLOAT = sizeof(Sum) == 4 && Sum(0.5f) != Sum(0);
    constexpr int COUNT = RIGHT / 2;
    char* const shared = hw::shared_memory();
    hw::Barrier* const full = reinterpret_cast<hw::Barrier*>(shared + S::STAGES * S::STAGE_BYTES);
    hw::Barrier* const empty = full + S::STAGES;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            hw::barrier_init(full + stage, 1);   // the copying thread
            hw::barrier_init(empty + stage, 8);  // one lane of each multiplying warp
        }
        hw::barrier_init_done();
    }
    __syncthreads();

    const int left_tiles = ((S::SWAPPED ? p.features : p.tokens) + S::LEFT_ROWS - 1) / S::LEFT_ROWS;
    const int right_tiles = ((S::SWAPPED ? p.tokens : p.features) + RIGHT - 1) / RIGHT;
    const int tiles = left_tiles * right_tiles, steps = (p.inner + DEPTH - 1) / DEPTH;
    int stage = 0;
    uint32_t phase = 0;  // parity of the stage's use that comes next
    const auto advance = [&] {
        if (++stage == S::STAGES) stage = 0, phase ^= 1;
    };

    if (threadIdx.x < 128) {
        hw::give_registers<COPYING_REGISTERS>();
        if (threadIdx.x == 0) {
            hw::prefetch_map(&left_map);
            hw::prefetch_map(&right_map);
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const Place place = place_of(tile, left_tiles, right_tiles);
                for (int step = 0; step < steps; ++step) {
                    hw::barrier_wait(empty + stage, phase ^ 1);
                    hw::barrier_arrive_expecting(full + stage, S::STAGE_BYTES);  // zeros beyond the ends count too
                    hw::copy_box(shared + stage * S::STAGE_BYTES, &left_map, full + stage, step * DEPTH, place.left * S::LEFT_ROWS);
                    hw::copy_box(shared + stage * S::STAGE_BYTES + S::LEFT_BYTES, &right_map, full + stage, step * DEPTH, place.right * RIGHT);
                    advance();
                }
            }
        }
    } else {
        hw::take_registers<MULTIPLYING_REGISTERS>();
        const int group_rows = 64 * LEFT, group_first = (threadIdx.x / 128 - 1) * group_rows;  // this warpgroup's left rows of a tile
        const auto release = [&](int used) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) hw::barrier_arrive(empty + used);
        };
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Place place = place_of(tile, left_tiles, right_tiles);
            const int left_row = place.left * S::LEFT_ROWS + group_first, right_row = place.right * RIGHT;
            Sum totals[LEFT][COUNT];
            if constexpr (IS_FLOAT) {
#pragma unroll
                for (int half = 0; half < LEFT; ++half)
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) totals[half][i] = 0;
            }
            int previous = 0;
            for (int step = 0; step < steps; ++step) {
                GroupScales<S::SWAPPED, LEFT, COUNT> scales;
                if constexpr (GROUPED) scales.load(p, left_row, right_row, step * DEPTH / p.group);  // on their way while the stage is waited for
                hw::barrier_wait(full + stage, phase);
                const uint64_t left = hw::wgmma_operand(shared + stage * S::STAGE_BYTES + group_first * DEPTH);
                const uint64_t right = hw::wgmma_operand(shared + stage * S::STAGE_BYTES + S::LEFT_BYTES);
                // 64 rows further are 8192 bytes, 32 codes further 32 bytes: in an operand 512 and 2, of sixteen bytes each.
                if constexpr (IS_FLOAT) {
#pragma unroll
                    for (int half = 0; half < LEFT; ++half) {
                        Sum sums[COUNT];
                        hw::wgmma_fence();
#pragma unroll
                        for (int k = 0; k < 4; ++k) hw::wgmma(sums, left + 512 * half + 2 * k, right + 2 * k, k != 0);
                        hw::wgmma_commit();
                        hw::wgmma_wait<0>();
                        if (half == LEFT - 1) release(stage);
#pragma unroll
                        for (int i = 0; i < COUNT; ++i) totals[half][i] += GROUPED ? sums[i] * scales.of(half, i) : sums[i];
                    }
                } else {
                    hw::wgmma_fence();
#pragma unroll
                    for (int half = 0; half < LEFT; ++half)
#pragma unroll
                        for (int k = 0; k < 4; ++k) hw::wgmma(totals[half], left + 512 * half + 2 * k, right + 2 * k, step != 0 || k != 0);
                    hw::wgmma_commit();
                    hw::wgmma_wait<1>();  // the step before is over, this one goes on
                    if (step > 0) release(previous);
                    previous = stage;
                }
                advance();
            }
            if constexpr (!IS_FLOAT) {
                hw::wgmma_wait<0>();
                release(previous);
            }
#pragma unroll
            for (int half = 0; half < LEFT; ++half) write<S::SWAPPED>(p, totals[half], left_row + 64 * half, right_row);
        }
    }
#endif
}

// One group, or groups of whole stages with one weight scale for 128 features, as 128 x 128 blocks have.
inline bool takes(const Product& p) { return !p.is_grouped() || (p.group % DEPTH == 0 && p.scale_columns == 128); }

template <class Operands, int LEFT, int RIGHT, bool GROUPED>
int launch_shape(const Product& p, int multiprocessors, void* stream) {
    using S = Shape<LEFT, RIGHT>;
    hw::TensorMap left, right;
    int error = hw::make_map(S::SWAPPED ? &right : &left, p.activations, p.tokens, p.inner, p.row_stride, S::SWAPPED ? RIGHT : S::LEFT_ROWS);
    if (!error) error = hw::make_map(S::SWAPPED ? &left : &right, p.weight, p.features, p.inner, p.inner, S::SWAPPED ? S::LEFT_ROWS : RIGHT);
    if (error) return error;
    const int tokens = multiply::count_of(p.tokens, S::SWAPPED ? RIGHT : S::LEFT_ROWS), features = multiply::count_of(p.features, S::SWAPPED ? S::LEFT_ROWS : RIGHT);
    const int64_t tiles = int64_t(tokens) * features;
    const hw::Grid grid{unsigned(tiles < multiprocessors ? tiles : multiprocessors), 1, 1};
    return hw::launch(matmul<Operands, LEFT, RIGHT, GROUPED>, grid, THREADS, S::SHARED_BYTES, stream, p, left, right);
}

template <class Operands, bool GROUPED>
int launch(const Product& p, int multiprocessors, void* stream) {
    if (p.tokens <= 32) return launch_shape<Operands, 1, 32, GROUPED>(p, multiprocessors, stream);
    if (p.tokens <= MOST_SWAPPED_TOKENS) return launch_shape<Operands, 1, 64, GROUPED>(p, multiprocessors, stream);
    // Larger tiles read less out of the L2 cache; smaller ones where there would be fewer of the larger than multiprocessors.
    const int64_t large = int64_t(multiply::count_of(p.tokens, 256)) * multiply::count_of(p.features, 128);
    if (large < multiprocessors) return launch_shape<Operands, 1, 128, GROUPED>(p, multiprocessors, stream);
    return launch_shape<Operands, 2, 128, GROUPED>(p, multiprocessors, stream);
}

}  // namespace wgmma_tile
