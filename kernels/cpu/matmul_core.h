// The loops around a register tile: what every multiplication shares.
//
// Activations are first rearranged, a row at a time: padded with zeros, spread so that rows don't share cache sets, decoded if the tiles want numbers.
// Then, for a superblock of rows that fits the second-level cache and a few panels of weights: a chunk of input features of the panels is (unpacked
// and) kept in the first-level cache while all rows of the superblock pass it. Sums stay in a buffer between chunks. Groups are chunks whose
// sums are scaled into float32 totals. Threads share superblocks and panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "lanes.h"
#include "matmul.h"
#include "tiles.h"

namespace QK_LEVEL {

// Aligned memory without the cost of making values; empty where there is none.
template <class T> class Scratch {
public:
    explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size_t(std::max<int64_t>(size, 1)) * sizeof(T), std::align_val_t(64), std::nothrow))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }
    explicit operator bool() const { return data_ != nullptr; }

private:
    T* data_;
};

constexpr int64_t L1_BYTES = 24 << 10;        // of unpacked weights
constexpr int64_t READY_BYTES = 64 << 10;     // of weights that are multiplied as they are stored: a longer sum costs less than a first-level cache saves
constexpr int64_t L2_BYTES = 1 << 20;         // of activations
constexpr int64_t SUPERBLOCK_ROWS = 256;      // at most; at least half of it

template <class Sum> inline lanes::Float as_numbers(const Sum* sums);
template <> inline lanes::Float as_numbers(const int32_t* sums) { return lanes::to_float(lanes::load_words(sums)); }
template <> inline lanes::Float as_numbers(const float* sums) { return lanes::load_float32(sums); }

// Where no output is a subnormal, or small ones may be lost, there is an instruction that rounds to bfloat16, and takes those as zero.
constexpr int TO_NORMAL_BFLOAT16 = QK_OUTPUTS;

template <int TYPE> inline void store_output(void* output, int64_t index, lanes::Float value) {
    if constexpr (TYPE == QK_TO_FLOAT32) lanes::store_float32(static_cast<float*>(output) + index, value);
#if defined(__AVX512BF16__)
    else if constexpr (TYPE == TO_NORMAL_BFLOAT16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(output) + index), (__m256i)_mm512_cvtneps_pbh(value));
#endif
    else if constexpr (TYPE == QK_TO_BFLOAT16 || TYPE == TO_NORMAL_BFLOAT16) lanes::store_bfloat16(static_cast<uint16_t*>(output) + index, value);
    else lanes::store_float16(static_cast<uint16_t*>(output) + index, value);
}

// The least magnitude of `count` numbers; NaN is passed over.
inline float least_magnitude(const float* x, int64_t count) {
    alignas(64) float lanes_least[lanes::WIDTH];
    lanes::Float least = lanes::broadcast(INFINITY);
    int64_t n = 0;
    for (; n + lanes::WIDTH <= count; n += lanes::WIDTH)
        least = lanes::smaller(lanes::as_float(lanes::only(lanes::as_word(lanes::load_float32(x + n)), 0x7FFFFFFFu)), least);
    lanes::store_float32(lanes_least, least);
    float result = *std::min_element(lanes_least, lanes_least + lanes::WIDTH);
    for (; n < count; ++n) result = std::min(result, std::abs(x[n]));
    return result;
}

// Whether an INT8 sum other than zero, which is 1 at least, becomes a normal number.
inline bool has_normal_outputs(const QkMatmul& m) {
    if (m.bias || !m.activation_scale || !m.weight_scale || m.activation_row_step > 1) return false;
    return least_magnitude(m.activation_scale, m.activation_row_step ? m.rows : 1) >= 0x1p-60f && least_magnitude(m.weight_scale, m.columns) >= 0x1p-60f;
}

// Sums to outputs: rows `row` to `row + count`, PANELS * 16 columns from `column` on or as many as there are. sums: SUMS_STRIDE apart; corrections: what to
// take from each row's, or nullptr. Each step rounds: the reference multiplies by the one scale, then by the other. Two panels at once, where they are whole,
// make a cache line of bfloat16: a row's outputs are far from the next row's, and half a line costs as much to write.
template <int TYPE, int PANELS, class Sum>
void finish_panels(const QkMatmul& m, int64_t row, int64_t count, int64_t column, const Sum* sums, const int32_t* corrections, bool scale) {
    constexpr int V = PANELS * QK_PANEL / lanes::WIDTH;
    constexpr int64_t MOST = PANELS * QK_PANEL;
    const int64_t columns = std::min(MOST, m.columns - column);
    alignas(64) float weight_scale[MOST], bias[MOST];
    std::fill(weight_scale, weight_scale + MOST, 1.0f);
    std::fill(bias, bias + MOST, 0.0f);
    const bool scaled = scale && m.weight_scale, biased = m.bias, own = scale && m.activation_scale;
    if (scaled) std::memcpy(weight_scale, m.weight_scale + column, size_t(columns) * 4);
    if (biased) std::memcpy(bias, m.bias + column, size_t(columns) * 4);
    for (int64_t r = 0; r < count; ++r, sums += SUMS_STRIDE) {
        const lanes::Float activation_scale = lanes::broadcast(own ? m.activation_scale[(row + r) * m.activation_row_step] : 1.0f);
        const auto output = [&](int v) QK_INLINE {
            lanes::Float value;
            if constexpr (std::is_same_v<Sum, int32_t>) {
                lanes::Word word = lanes::load_words(sums + v * lanes::WIDTH);
                value = lanes::to_float(corrections ? lanes::subtract(word, lanes::broadcast(uint32_t(corrections[r]))) : word);
            } else {
                value = lanes::load_float32(sums + v * lanes::WIDTH);
            }
            // Where there is no scale, one multiplication by 1 costs less than a branch and changes nothing.
            value = lanes::multiply(lanes::multiply(value, activation_scale), lanes::load_float32(weight_scale + v * lanes::WIDTH));
            return biased ? lanes::add(value, lanes::load_float32(bias + v * lanes::WIDTH)) : value;
        };
        const int64_t at = (row + r) * m.columns + column;
#if defined(__AVX512BF16__)
        if constexpr (TYPE == TO_NORMAL_BFLOAT16 && PANELS == 2) {
            _mm512_storeu_si512(static_cast<uint16_t*>(m.output) + at, (__m512i)_mm512_cvtne2ps_pbh(output(1), output(0)));
            continue;
        }
#endif
        alignas(64) unsigned char padded[MOST * 4];
        for (int v = 0; v < V; ++v) {
            if (columns == MOST) store_output<TYPE>(m.output, at + v * lanes::WIDTH, output(v));
            else store_output<TYPE>(padded, v * lanes::WIDTH, output(v));
        }
        if (columns < MOST) {
            const size_t size = TYPE == QK_TO_FLOAT32 ? 4 : 2;
            std::memcpy(static_cast<unsigned char*>(m.output) + size_t(at) * size, padded, size_t(columns) * size);
        }
    }
}

// The same of `panels` panels.
template <int TYPE, class Sum>
void finish_all(const QkMatmul& m, int64_t row, int64_t count, int64_t column, int panels, const Sum* sums, const int32_t* corrections, bool scale) {
    for (int panel = 0; panel < panels;) {
        const int64_t first = column + panel * QK_PANEL;
        const bool pair = panel + 1 < panels && first + 2 * QK_PANEL <= m.columns;
        if (pair) finish_panels<TYPE, 2>(m, row, count, first, sums + panel * QK_PANEL, corrections, scale);
        else finish_panels<TYPE, 1>(m, row, count, first, sums + panel * QK_PANEL, corrections, scale);
        panel += pair ? 2 : 1;
    }
}

template <class Sum>
inline void finish(const QkMatmul& m, int64_t row, int64_t count, int64_t column, int panels, const Sum* sums, const int32_t* corrections, bool scale, int type) {
    if (type == TO_NORMAL_BFLOAT16) return finish_all<TO_NORMAL_BFLOAT16>(m, row, count, column, panels, sums, corrections, scale);
    if (type == QK_TO_BFLOAT16) return finish_all<QK_TO_BFLOAT16>(m, row, count, column, panels, sums, corrections, scale);
    if (type == QK_TO_FLOAT16) return finish_all<QK_TO_FLOAT16>(m, row, count, column, panels, sums, corrections, scale);
    finish_all<QK_TO_FLOAT32>(m, row, count, column, panels, sums, corrections, scale);
}

// One row's INT8 sums of 16 columns from `column` on, without what the activations' zero point added.
inline void take_zero_point(const QkMatmul& m, int64_t row, int64_t column, int32_t* sums) {
    const uint32_t zero_point = uint32_t(m.zero_point[row * m.zero_point_step]);
    for (int64_t n = 0; n < std::min(QK_PANEL, m.columns - column); ++n) sums[n] = int32_t(uint32_t(sums[n]) - zero_point * uint32_t(m.weight_sums[column + n]));
}
inline void take_zero_point(const QkMatmul&, int64_t, int64_t, float*) {}

inline void correct(int32_t correction, int32_t* sums) {
    using namespace lanes;
    for (int64_t n = 0; n < QK_PANEL; n += WIDTH) store_words(sums + n, subtract(load_words(sums + n), broadcast(uint32_t(correction))));
}
inline void correct(int32_t, float*) {}

// totals += sums * scales of this group.
template <class Sum> inline void add_group(const QkMatmul& m, int64_t row, int64_t column, int64_t group, const Sum* sums, float* totals) {
    const float own = m.activation_scale ? m.activation_scale[row * m.activation_row_step + group * m.activation_group_step] : 1.0f;
    const float* scale = m.weight_scale ? m.weight_scale + group * m.weight_group_step + column : nullptr;
    if (m.columns - column < QK_PANEL) {
        for (int64_t n = 0; n < m.columns - column; ++n) totals[n] += float(sums[n]) * (scale ? own * scale[n] : own);
        return;
    }
    for (int64_t n = 0; n < QK_PANEL; n += lanes::WIDTH) {
        lanes::Float factor = lanes::broadcast(own);
        if (scale) factor = lanes::multiply(factor, lanes::load_float32(scale + n));
        lanes::store_float32(totals + n, lanes::multiply_add(as_numbers(sums + n), factor, lanes::load_float32(totals + n)));
    }
}

// Source says how operands are stored:
//   Tiles, Input                       the tiles that multiply them, the activations' type
//   BYTES                              of packed weight to one input feature and output feature
//   READY                              whether packed weights are what the tiles multiply
//   folds(m)                           whether scales go into the operands, which powers of two do without a loss
//   load_row(m, x, row, inner, a, corrections)  row of x as the tiles want it, zeros up to inner; what to take from the INT8 sums of each group
//   unpack(m, packed, k, count, column, out)  else: `count` input features from k on, of one panel
template <class Source> bool multiply(const QkMatmul& m, const typename Source::Input* x, const uint8_t* packed) {
    using Tiles = typename Source::Tiles;
    using Activation = typename Tiles::Activation;
    using Weight = typename Tiles::Weight;
    using Sum = typename Tiles::Sum;
    const int64_t inner = qk_rounded_up(m.inner, QK_INNER_UNIT), panels = (m.columns + QK_PANEL - 1) / QK_PANEL;
    const bool grouped = m.group < m.inner && !Source::folds(m);
    const TileShape shape = tile_shape<Tiles>(m.rows, grouped ? m.group : QK_INNER_UNIT);
    // A whole number of cache lines, and not of pages: the rows of a tile would fall on each other.
    const int64_t stride = inner + (inner * int64_t(sizeof(Activation)) % 1024 == 0 ? 64 / int64_t(sizeof(Activation)) : 0);
    const int64_t rows = qk_rounded_up(m.rows, shape.row_unit);
    const int64_t fitting = L2_BYTES / (stride * int64_t(sizeof(Activation))) / 32 * 32;
    const int64_t superblock = std::min(rows, std::clamp(fitting, SUPERBLOCK_ROWS / 2, SUPERBLOCK_ROWS));
    const int64_t superblocks = (rows + superblock - 1) / superblock, blocks = (panels + shape.panels - 1) / shape.panels;
    // Chunks of about one size, a little more than what fits if that saves one: sums go to memory and back between them.
    const int64_t fitting_inner = (Source::READY ? READY_BYTES : L1_BYTES) / (shape.panels * QK_PANEL * int64_t(sizeof(Weight)));
    const int64_t chunks = std::max<int64_t>(1, (4 * inner + 5 * fitting_inner - 1) / (5 * fitting_inner));
    const int64_t chunk = grouped ? m.group : Source::READY && rows <= shape.rows ? inner : qk_rounded_up((inner + chunks - 1) / chunks, QK_INNER_UNIT);
    const int threads = int(std::min<int64_t>(m.threads, superblocks * blocks));

    Scratch<Activation> activations(rows * stride);
    const int64_t groups = grouped ? (m.inner + m.group - 1) / m.group : 1;
    Scratch<int32_t> corrections(rows * groups);
    if (!activations || !corrections) return false;
    bool complete = true;
    const int type = m.output_type == QK_TO_BFLOAT16 && (std::is_same_v<Sum, float> || has_normal_outputs(m)) ? TO_NORMAL_BFLOAT16 : m.output_type;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            Activation* a = activations.get() + row * stride;
            if (row < m.rows) Source::load_row(m, x, row, inner, a, corrections.get() + row * groups);
            else std::memset(a, 0, size_t(inner) * sizeof(Activation));
        }
        const Session session;
        (void)session;
        Scratch<Weight> unpacked(Source::READY ? 0 : chunk * shape.panels * QK_PANEL);
        Scratch<Sum> sums(superblock * SUMS_STRIDE);
        Scratch<float> totals(grouped ? superblock * SUMS_STRIDE : 0);
        if (!unpacked || !sums || !totals) {
#pragma omp atomic write
            complete = false;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < superblocks * blocks; ++task) {
            if (!complete) continue;
            const int64_t first_row = task / blocks * superblock, end_row = std::min(first_row + superblock, rows);
            const int64_t first_panel = task % blocks * shape.panels;
            const int count = int(std::min<int64_t>(shape.panels, panels - first_panel));
            if (grouped) std::memset(totals.get(), 0, size_t((end_row - first_row) * SUMS_STRIDE) * sizeof(float));
            for (int64_t k = 0; k < (grouped ? m.inner : inner); k += chunk) {
                const int64_t length = std::min(chunk, inner - k);
                const Weight* weights;
                int64_t panel_stride;
                if constexpr (Source::READY) {
                    panel_stride = inner * QK_PANEL * Source::BYTES / int64_t(sizeof(Weight));
                    weights = reinterpret_cast<const Weight*>(packed) + first_panel * panel_stride + k * QK_PANEL * Source::BYTES / int64_t(sizeof(Weight));
                } else {
                    panel_stride = length * QK_PANEL;
                    weights = unpacked.get();
                    for (int panel = 0; panel < count; ++panel)
                        Source::unpack(m, packed + ((first_panel + panel) * inner + k) * QK_PANEL * Source::BYTES, k, length, (first_panel + panel) * QK_PANEL,
                                       unpacked.get() + panel * panel_stride);
                }
                const bool last = k + length >= (grouped ? m.inner : inner);
                // A tile's sums are taken up after the next tile has been started: they come out of registers late.
                for (int64_t row = first_row; row < end_row + shape.rows; row += shape.rows) {
                    if (row < end_row) {
                        const int height = int(std::min<int64_t>(shape.rows, end_row - row));
                        multiply_tile<Tiles>(shape, height, count, activations.get() + row * stride + k, stride, weights, panel_stride, length,
                                             sums.get() + (row - first_row) * SUMS_STRIDE, k > 0 && !grouped);
                    }
                    if (row == first_row || (!grouped && !last)) continue;
                    const int64_t before = row - shape.rows, exist = std::min<int64_t>({shape.rows, end_row - before, m.rows - before});
                    Sum* own = sums.get() + (before - first_row) * SUMS_STRIDE;
                    float* total = grouped ? totals.get() + (before - first_row) * SUMS_STRIDE : nullptr;
                    for (int panel = 0; panel < count && (grouped || m.zero_point); ++panel) {
                        const int64_t column = (first_panel + panel) * QK_PANEL;
                        for (int64_t r = 0; r < exist; ++r) {
                            Sum* at = own + r * SUMS_STRIDE + panel * QK_PANEL;
                            if (grouped) correct(corrections.get()[(before + r) * groups + k / chunk], at);
                            if (grouped) add_group(m, before + r, column, k / chunk, at, total + r * SUMS_STRIDE + panel * QK_PANEL);
                            if (m.zero_point) take_zero_point(m, before + r, column, at);
                        }
                    }
                    if (!last) continue;
                    if (grouped) finish(m, before, exist, first_panel * QK_PANEL, count, total, nullptr, false, type);
                    else finish(m, before, exist, first_panel * QK_PANEL, count, own, corrections.get() + before, !Source::folds(m), type);
                }
            }
        }
    }
    return complete;
}

}  // namespace QK_LEVEL
