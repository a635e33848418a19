// nll = log(sum exp(l)) - l[target];  KL(base|own) = sum p_base (l_base - l_own) - log(sum exp(l_base)) + log(sum exp(l_own));  l = hidden w^T + bias.
//
// Within float32's rounding of quantkit/ops/score_logits.py: score_parts. Logits of two models are made a tile at a time and gone again before the next, so that
// no logit is ever written to memory that is larger than a cache.
//
// exp(l - r) with r near the largest logit so far: sums of 1024 columns in float32, over those in float64. r is raised where a logit exceeds it by 60.

#include "score_logits.h"

#include "exponential.h"
#include "float_operands.h"

namespace QK_LEVEL {
namespace {

using Tiles = FloatTiles;
constexpr int V = 2 * QK_PANEL / lanes::WIDTH;   // vectors in two panels
constexpr int64_t PAIR = 2 * QK_PANEL;           // columns
constexpr int64_t PAIRS_TO_A_SUM = 32;           // 1024 columns
constexpr float HEADROOM = 60.0f, NOTHING = -1e30f;  // a logit of what is behind the last column; its difference to another such is no NaN

// A model's sums for one row.
struct RowState {
    alignas(64) float top[lanes::WIDTH], total[lanes::WIDTH], divergence[lanes::WIDTH];
    alignas(64) uint32_t place[lanes::WIDTH];  // which vector of columns holds each lane's top
    double totals, divergences;
    float reference, target;
};

// Take `factor` into all sums.
inline void rescale(RowState& state, float factor) {
    for (int lane = 0; lane < lanes::WIDTH; ++lane) state.total[lane] *= factor, state.divergence[lane] *= factor;
    state.totals *= factor, state.divergences *= factor;
}

// Looks at V vectors of logits; returns those minus the reference as exponentials. The reference is set by the first ones.
inline void see(RowState& state, const lanes::Float* logits, uint32_t pair, lanes::Float* exponentials) {
    using namespace lanes;
    Float top = load_float32(state.top);
    Word place = load_words(state.place);
    Float most = logits[0];
    each<V>([&](auto v) QK_INLINE {
        const Mask higher = less(top, logits[v]);
        top = choose(higher, logits[v], top);
        place = choose(higher, broadcast(pair * V + v), place);
        most = larger(most, logits[v]);
    });
    store_float32(state.top, top);
    store_words(state.place, place);
    if (pair == 0) state.reference = largest(most);
    if (any(less(broadcast(state.reference + HEADROOM), most))) {
        const float reference = largest(most);
        alignas(64) float factor[WIDTH];
        store_float32(factor, exponential(broadcast(state.reference - reference)));
        rescale(state, factor[0]);
        state.reference = reference;
    }
    const Float reference = broadcast(-state.reference);
    Float total = load_float32(state.total);
    each<V>([&](auto v) QK_INLINE {
        exponentials[v] = exponential(add(logits[v], reference));
        total = add(total, exponentials[v]);
    });
    store_float32(state.total, total);
}

struct Side {
    const QkHead& head;
    Scratch<Tiles::Activation> activations;
    Scratch<float> sums;
    Scratch<Tiles::Weight> unpacked;
    Scratch<RowState> states;
    explicit operator bool() const { return activations && sums && unpacked && states; }
};

// Rows [first, first + count) on this thread.
class Worker {
public:
    Worker(const QkScores& scores, int64_t count)
        : s(scores), inner(qk_rounded_up(s.inner, QK_INNER_UNIT)), stride(inner + (inner * int64_t(sizeof(Tiles::Activation)) % 1024 == 0 ? 64 / int64_t(sizeof(Tiles::Activation)) : 0)),
          shape(tile_shape<Tiles>(count, QK_INNER_UNIT)), rows(qk_rounded_up(count, shape.row_unit)), base(side(s.base)), quant(side(s.quant)) {}

    explicit operator bool() const { return bool(base) && bool(quant); }

    void run(int64_t first, int64_t count) {
        start(base, first, count);
        if (s.quant.hidden) start(quant, first, count);
        const Session session;
        (void)session;
        const int64_t panels = (s.columns + QK_PANEL - 1) / QK_PANEL;
        for (int64_t panel = 0; panel < panels; panel += 2) {
            const int width = int(std::min<int64_t>(2, panels - panel));
            const Tiles::Weight* weights = weights_of(base, panel, width);
            const Tiles::Weight* own = s.quant.hidden ? s.quant.packed == s.base.packed ? weights : weights_of(quant, panel, width) : nullptr;
            // A tile's sums are taken up after the next tiles have been started: they come out of registers late.
            for (int64_t row = 0; row < rows + shape.rows; row += shape.rows) {
                if (row < rows) {
                    const int height = int(std::min<int64_t>(shape.rows, rows - row));
                    multiply_rows(base, row, height, width, weights);
                    if (own) multiply_rows(quant, row, height, width, own);
                }
                if (row == 0) continue;
                const int64_t before = row - shape.rows, end = std::min(row, count);
                if (own) take<true>(first, before, end, panel * QK_PANEL, width);
                else take<false>(first, before, end, panel * QK_PANEL, width);
            }
            if (panel / 2 % PAIRS_TO_A_SUM == PAIRS_TO_A_SUM - 1) flush(count);
        }
        flush(count);
        for (int64_t r = 0; r < count; ++r) finish(first, r);
    }

private:
    Side side(const QkHead& head) const {
        const bool used = head.hidden;
        constexpr bool READY = BFloat16Operands::READY;
        return {head, Scratch<Tiles::Activation>(used ? rows * stride : 1), Scratch<float>(used ? 2 * shape.rows * SUMS_STRIDE : 1), Scratch<Tiles::Weight>(READY || !used ? 1 : inner * PAIR),
                Scratch<RowState>(used ? rows : 1)};
    }

    void start(Side& side, int64_t first, int64_t count) const {
        QkMatmul m{};
        m.inner = s.inner, m.row_stride = side.head.row_stride;
        for (int64_t r = 0; r < rows; ++r) {
            Tiles::Activation* a = side.activations.get() + r * stride;
            if (r < count) BFloat16Operands::load_row(m, side.head.hidden, first + r, inner, a, nullptr);
            else std::memset(a, 0, size_t(inner) * sizeof *a);
            RowState& state = side.states.get()[r];
            std::memset(&state, 0, sizeof state);
            std::fill(state.top, state.top + lanes::WIDTH, -INFINITY);
        }
    }

    const Tiles::Weight* weights_of(const Side& side, int64_t panel, int width) const {
        if constexpr (BFloat16Operands::READY) return reinterpret_cast<const Tiles::Weight*>(side.head.packed) + panel * inner * QK_PANEL;
        for (int n = 0; n < width; ++n)
            BFloat16Operands::unpack({}, side.head.packed + (panel + n) * inner * QK_PANEL * BFloat16Operands::BYTES, 0, inner, 0, side.unpacked.get() + n * inner * QK_PANEL);
        return side.unpacked.get();
    }

    void multiply_rows(const Side& side, int64_t row, int height, int width, const Tiles::Weight* weights) const {
        for (int panel = 0; panel < width; panel += shape.panels)
            multiply_tile<Tiles>(shape, height, std::min(shape.panels, width - panel), side.activations.get() + row * stride, stride, weights + panel * inner * QK_PANEL,
                                 inner * QK_PANEL, inner, sums_of(side, row) + panel * QK_PANEL, false);
    }

    // Two tiles have room: one is made while the other is taken up.
    float* sums_of(const Side& side, int64_t row) const { return side.sums.get() + row % (2 * shape.rows) * SUMS_STRIDE; }

    // The two panels' logits of one row, with those behind the last column taken out.
    void logits_of(const Side& side, int64_t r, int64_t column, int64_t exist, lanes::Float* logits) const {
        using namespace lanes;
        const float* sums = sums_of(side, r);
        if (exist == PAIR) {
            each<V>([&](auto v) QK_INLINE {
                logits[v] = load_float32(sums + v * WIDTH);
                if (side.head.bias) logits[v] = add(logits[v], load_float32(side.head.bias + column + v * WIDTH));
            });
            return;
        }
        alignas(64) float padded[PAIR];
        for (int64_t n = 0; n < PAIR; ++n) padded[n] = n < exist ? sums[n] + (side.head.bias ? side.head.bias[column + n] : 0.0f) : NOTHING;
        each<V>([&](auto v) QK_INLINE { logits[v] = load_float32(padded + v * WIDTH); });
    }

    template <bool TWO> void take(int64_t first, int64_t row, int64_t end, int64_t column, int width) const {
        using namespace lanes;
        const int64_t exist = std::min<int64_t>(width * QK_PANEL, s.columns - column);
        for (int64_t r = row; r < end; ++r) {
            Float logits[V], exponentials[V];
            RowState& state = base.states.get()[r];
            logits_of(base, r, column, exist, logits);
            see(state, logits, uint32_t(column / PAIR), exponentials);
            const int64_t target = s.targets[first + r] - column;
            const bool here = target >= 0 && target < exist;
            if (here) state.target = sums_of(base, r)[target] + (s.base.bias ? s.base.bias[column + target] : 0.0f);
            if constexpr (TWO) {
                Float theirs[V], ignored[V];
                RowState& own = quant.states.get()[r];
                logits_of(quant, r, column, exist, theirs);
                see(own, theirs, uint32_t(column / PAIR), ignored);
                if (here) own.target = sums_of(quant, r)[target] + (s.quant.bias ? s.quant.bias[column + target] : 0.0f);
                Float divergence = load_float32(state.divergence);
                each<V>([&](auto v) QK_INLINE { divergence = multiply_add(exponentials[v], add(logits[v], multiply(theirs[v], broadcast(-1.0f))), divergence); });
                store_float32(state.divergence, divergence);
            }
        }
    }

    void flush(int64_t count) const {
        for (const Side* side : {&base, &quant}) {
            if (!side->head.hidden) continue;
            for (int64_t r = 0; r < count; ++r) {
                RowState& state = side->states.get()[r];
                state.totals += lanes::sum(lanes::load_float32(state.total));
                state.divergences += lanes::sum(lanes::load_float32(state.divergence));
                std::fill(state.total, state.total + lanes::WIDTH, 0.0f);
                std::fill(state.divergence, state.divergence + lanes::WIDTH, 0.0f);
            }
        }
    }

    // Writes nll and index; returns log(sum exp(logits)).
    static double settle(const RowState& state, const QkHead& head, int64_t row, float& top) {
        int64_t index = 0;
        top = -INFINITY;
        for (int lane = 0; lane < lanes::WIDTH; ++lane) {
            const int64_t column = int64_t(state.place[lane]) * lanes::WIDTH + lane;
            if (state.top[lane] > top || (state.top[lane] == top && column < index)) top = state.top[lane], index = column;
        }
        const double log_total = double(state.reference) + std::log(state.totals);
        head.nll[row] = log_total - double(state.target);
        head.index[row] = index;
        return log_total;
    }

    void finish(int64_t first, int64_t r) const {
        float top, other;
        const RowState& state = base.states.get()[r];
        const double log_total = settle(state, s.base, first + r, top);
        s.base.extra[first + r] = std::exp(double(top) - log_total);
        if (!s.quant.hidden) return;
        const double own = settle(quant.states.get()[r], s.quant, first + r, other);
        s.quant.extra[first + r] = state.divergences / state.totals - log_total + own;
    }

    const QkScores& s;
    const int64_t inner, stride;
    const TileShape shape;
    const int64_t rows;
    Side base, quant;
};

}  // namespace

bool score_logits(const QkScores& s) {
    // So many rows of both models stay in the second-level cache while the vocabulary goes by.
    const int64_t fitting = 2 * L2_BYTES / (2 * s.inner * int64_t(sizeof(Tiles::Activation))) / 32 * 32;
    const int64_t block = std::min(std::clamp<int64_t>(fitting, 256, 512), s.rows);  // whatever the number of threads: the results don't depend on it
    const int64_t blocks = (s.rows + block - 1) / block;
    bool complete = true;
#pragma omp parallel for num_threads(int(std::min<int64_t>(s.threads, blocks))) schedule(dynamic) if (s.threads > 1 && blocks > 1)
    for (int64_t number = 0; number < blocks; ++number) {
        const int64_t first = number * block, count = std::min(block, s.rows - first);
        Worker worker(s, count);
        if (worker) worker.run(first, count);
        else {
#pragma omp atomic write
            complete = false;
        }
    }
    return complete;
}

}  // namespace QK_LEVEL
