// amax[c] = max_r |x[r, c]|;  squares[c] += sum_r x[r, c]^2;  histogram[bin(|x|)] += 1;  and extremes, row maxima, and how many |x| > above.
//
// bin(|x|) = clamp((float32 bits of |x| >> 19) - 1520, 0, 1023): 8 exponent bits and 4 of mantissa, 16 bins an octave, 2^-32 to 2^32. Bit for bit
// equal to quantkit/ops/fallback.py: observe_rows.
//
// Each value is loaded once, in tiles of 64 rows and a few vectors of columns whose accumulators stay in registers; bfloat16 stays in 16-bit lanes
// but for its squares. All that takes 0.3 cycles a value with AVX-512. The histogram takes one: its increment is a store, and a core writes to one
// cache line a cycle.
//
// This file is compiled once for each instruction set (lanes.h), into a namespace named QK_LEVEL.

#include "observe_rows.h"

#include "lanes.h"

namespace QK_LEVEL {
namespace {

using lanes::Float;
using lanes::Word;
using lanes::WIDTH;

constexpr int BINS = 1024;
constexpr uint32_t SHIFT = 19, OFFSET = (127 - 32) << 4;  // 2^-32 is bin 0's
constexpr int CHUNK = 64;   // rows whose squares are summed in float32 before they go to float64: part of the definition
constexpr int TABLES = 8;   // of the histogram, interleaved: neighbours of one bin don't wait for one another's increment to come back from memory
constexpr int GROUP = 4;    // rows whose bins are found before they are counted: the increments of one group and the vectors of the next overlap

inline uint32_t bin_of(uint32_t magnitude) {
    const uint32_t key = magnitude >> SHIFT;
    return key < OFFSET ? 0 : key - OFFSET < BINS ? key - OFFSET : BINS - 1;
}

// ---- Lanes: how many values a vector has and what is done with their bits. A slot is bin * TABLES, where a bin's first table is.

#if defined(__AVX2__)
// bfloat16 in lanes of 16 bits: the upper half of its float32.
struct BFloat16 {
    using Stored = uint16_t;
    using Lane = uint16_t;
    using Vector = lanes::Narrow;
    static constexpr int LANES = lanes::NARROW_WIDTH, VECTORS = 2, FLOATS = 2;
    static inline uint32_t widen(Lane x) { return uint32_t(x) << 16; }
    // The largest bits whose float32 is at most that, and the least whose float32 is at least that.
    static inline Lane at_most(uint32_t bits) { return Lane(bits >> 16); }
    static inline Lane at_least(uint32_t bits) { return Lane((bits + 0xFFFFu) >> 16); }
    static inline Vector broadcast(Lane x) { return lanes::broadcast_narrow(x); }
    static inline Vector load(const Stored* x) { return lanes::load_words(x); }
    static inline void store(Lane* p, Vector x) { lanes::store_words(p, x); }
    static inline Vector magnitude(Vector x) { return lanes::only_narrow(x, 0x7FFF); }
    static inline Vector larger(Vector a, Vector b) { return lanes::larger_narrow(a, b); }
    static inline Vector smaller(Vector a, Vector b) { return lanes::smaller_narrow(a, b); }
    static inline Vector larger_signed(Vector a, Vector b) { return lanes::larger_signed_narrow(a, b); }
    static inline Vector subtract(Vector a, Vector b) { return lanes::subtract_narrow(a, b); }
    static inline Vector count_at_most(Vector count, Vector x, Vector limit) { return lanes::count_at_most_narrow(count, x, limit); }
    static inline Lane largest(Vector x) { return lanes::largest_narrow(x); }
    static inline Vector slots(Vector magnitude) {
        static_assert(TABLES == 1 << (SHIFT - 16), "a slot is a magnitude without its lowest bits");
        Vector above = lanes::subtract_to_zero_narrow(magnitude, broadcast(OFFSET * TABLES));
        return lanes::only_narrow(lanes::smaller_narrow(above, broadcast(BINS * TABLES - 1)), Lane(-TABLES));
    }
    static inline void add_squares(Vector x, Float* sums) {
        const Float even = lanes::even_bfloat16(x), odd = lanes::as_float(lanes::only(x, 0xFFFF0000u));
        sums[0] = lanes::add(sums[0], lanes::multiply(even, even));
        sums[1] = lanes::add(sums[1], lanes::multiply(odd, odd));
    }
    static inline void store_sums(float* p, const Float* sums) {
        float even[WIDTH], odd[WIDTH];
        lanes::store_float32(even, sums[0]);
        lanes::store_float32(odd, sums[1]);
        for (int i = 0; i < WIDTH; ++i) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
    }
};
#endif

// Any type in lanes of 32 bits: its float32.
template <class Type, Float (*LOAD)(const void*)>
struct Wide {
    using Stored = Type;
    using Lane = uint32_t;
    using Vector = Word;
    static constexpr int LANES = WIDTH, VECTORS = WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 16, FLOATS = 1;
    static inline uint32_t widen(Lane x) { return x; }
    static inline Lane at_most(uint32_t bits) { return bits; }
    static inline Lane at_least(uint32_t bits) { return bits; }
    static inline Vector broadcast(Lane x) { return lanes::broadcast(x); }
    static inline Vector load(const Stored* x) { return lanes::as_word(LOAD(x)); }
    static inline void store(Lane* p, Vector x) { lanes::store_words(p, x); }
    static inline Vector magnitude(Vector x) { return lanes::only(x, 0x7FFFFFFFu); }
    static inline Vector larger(Vector a, Vector b) { return lanes::larger(a, b); }
    static inline Vector smaller(Vector a, Vector b) { return lanes::smaller(a, b); }
    static inline Vector larger_signed(Vector a, Vector b) { return lanes::larger_signed(a, b); }
    static inline Vector subtract(Vector a, Vector b) { return lanes::subtract(a, b); }
    static inline Vector count_at_most(Vector count, Vector x, Vector limit) { return lanes::count_at_most(count, x, limit); }
    static inline Lane largest(Vector x) { return lanes::largest(x); }
    static inline Vector slots(Vector magnitude) {
        const Vector first = broadcast(OFFSET << SHIFT);
        Vector above = smaller(subtract(larger(magnitude, first), first), broadcast((BINS << SHIFT) - 1));
        return lanes::only(lanes::shift_right<16>(above), uint32_t(-TABLES));
    }
    static inline void add_squares(Vector x, Float* sums) { sums[0] = lanes::add(sums[0], lanes::multiply(lanes::as_float(x), lanes::as_float(x))); }
    static inline void store_sums(float* p, const Float* sums) { lanes::store_float32(p, sums[0]); }
};

#if !defined(__AVX2__)
using BFloat16 = Wide<uint16_t, lanes::load_bfloat16>;
#endif
using Float16 = Wide<uint16_t, lanes::load_float16>;
using Float32 = Wide<float, lanes::load_float32>;

// ---- A histogram in 32 bits, emptied into 64 before a table can overflow.

struct Histogram {
    static constexpr int64_t FULL = int64_t(1) << 31;
    uint32_t tables[BINS * TABLES] = {};
    int64_t counted = 0;

    template <class Lane>
    inline void count(const Lane* slots, int64_t n) {
        int64_t i = 0;
        for (; i + TABLES <= n; i += TABLES) {
#pragma GCC unroll 8
            for (int table = 0; table < TABLES; ++table) ++tables[size_t(slots[i + table]) + size_t(table)];
        }
        for (; i < n; ++i) ++tables[size_t(slots[i]) + size_t(i % TABLES)];
        counted += n;
    }

    void empty_into(int64_t* histogram) {
        for (int bin = 0; bin < BINS; ++bin)
            for (int table = 0; table < TABLES; ++table) histogram[bin] += tables[bin * TABLES + table];
        std::memset(tables, 0, sizeof tables);
        counted = 0;
    }
};

// ---- Which |x| are above: those from `least` to infinity, none if that is empty. As unsigned integers, |x| - least is at most `span` for those only.

struct Above {
    bool any;
    uint32_t least;
    explicit Above(float above) : any(above < float_of(INFINITY_BITS)), least(any && above >= 0.0f ? bits_of(above + 0.0f) + 1 : 0) {}  // + 0: of -0 too
};

// ---- Minimum and maximum from bits. As unsigned integers, negative numbers are above all others, and the more so the further they are from 0: the
// largest is the minimum. As signed ones they are below all others: the largest is the maximum. Where all numbers have one sign, one of these is
// still right, the other is again the one furthest from 0, and what is wanted is the smallest unsigned. Either way the two hold the largest |x|.

struct Extremes {
    int32_t highest = INT32_MIN;
    uint32_t lowest = 0, least = UINT32_MAX;

    void add_to(float* extremes, bool has_nan) const {
        const float zero = 0.0f;  // makes 0 of -0
        const float minimum = float_of(lowest >> 31 ? lowest : least) + zero, maximum = float_of(highest >= 0 ? uint32_t(highest) : least) + zero;
        if (has_nan) {
            extremes[0] = extremes[1] = float_of(INFINITY_BITS | 0x400000u);
        } else {
            if (minimum < extremes[0]) extremes[0] = minimum;
            if (maximum > extremes[1]) extremes[1] = maximum;
        }
    }
};

template <class Lanes>
struct Tile {
    static constexpr int COLUMNS = Lanes::LANES * Lanes::VECTORS;
    using Stored = typename Lanes::Stored;
    using Lane = typename Lanes::Lane;
    using Vector = typename Lanes::Vector;

    Histogram histogram;
    Extremes extremes;
    Above above;
    int64_t above_count = 0;
    Vector row_largest[CHUNK];  // of each row, lane by lane

    explicit Tile(float threshold) : above(threshold) {}

    // x: rows x COLUMNS, of which all are WHOLE, or n columns count and the others hold 0. amax, sums: of these columns. next: where the next tile is.
    template <bool WHOLE>
    inline void observe(const Stored* x, int64_t rows, int64_t stride, int n, float* amax, double* sums, const Stored* next) {
        constexpr int VECTORS = Lanes::VECTORS, FLOATS = Lanes::FLOATS;
        const Vector least = Lanes::broadcast(Lanes::at_least(above.least));
        const Vector span = Lanes::broadcast(Lane(Lanes::at_most(INFINITY_BITS) - Lanes::at_least(above.least)));
        Vector highest[VECTORS], lowest[VECTORS], smallest[VECTORS], aboves[VECTORS];
        Float squares[VECTORS * FLOATS];
        for (int v = 0; v < VECTORS; ++v) {
            highest[v] = Lanes::broadcast(Lane(1u << (8 * sizeof(Lane) - 1)));
            lowest[v] = aboves[v] = Lanes::broadcast(0);
            smallest[v] = Lanes::broadcast(Lane(-1));
            for (int f = 0; f < FLOATS; ++f) squares[v * FLOATS + f] = lanes::broadcast(0.0f);
        }
        for (int64_t first = 0; first < rows; first += GROUP) {
            alignas(64) Lane slots[GROUP * COLUMNS];
            const int64_t end = first + GROUP < rows ? first + GROUP : rows;
            for (int64_t row = first; row < end; ++row) {
                Vector largest = row_largest[row];
                for (int v = 0; v < VECTORS; ++v) {
                    const Vector value = Lanes::load(x + row * stride + v * Lanes::LANES), magnitude = Lanes::magnitude(value);
                    lanes::prefetch(next + row * stride + v * Lanes::LANES);
                    highest[v] = Lanes::larger_signed(highest[v], value);
                    lowest[v] = Lanes::larger(lowest[v], value);
                    smallest[v] = Lanes::smaller(smallest[v], value);
                    largest = Lanes::larger(largest, magnitude);
                    aboves[v] = Lanes::count_at_most(aboves[v], Lanes::subtract(magnitude, least), span);
                    Lanes::add_squares(value, squares + v * FLOATS);
                    Lanes::store(slots + (row - first) * COLUMNS + v * Lanes::LANES, Lanes::slots(magnitude));
                }
                row_largest[row] = largest;
            }
            if (WHOLE)
                histogram.count(slots, (end - first) * COLUMNS);
            else
                for (int64_t row = first; row < end; ++row) histogram.count(slots + (row - first) * COLUMNS, n);
        }
        Lane highest_of[COLUMNS], lowest_of[COLUMNS], smallest_of[COLUMNS], aboves_of[COLUMNS];
        float squares_of[COLUMNS];
        for (int v = 0; v < VECTORS; ++v) {
            Lanes::store(highest_of + v * Lanes::LANES, highest[v]);
            Lanes::store(lowest_of + v * Lanes::LANES, lowest[v]);
            Lanes::store(smallest_of + v * Lanes::LANES, smallest[v]);
            Lanes::store(aboves_of + v * Lanes::LANES, aboves[v]);
            Lanes::store_sums(squares_of + v * Lanes::LANES, squares + v * FLOATS);
        }
        const int columns = WHOLE ? COLUMNS : n;
        uint32_t total = 0;
        for (int c = 0; c < columns; ++c) {
            const uint32_t high = Lanes::widen(highest_of[c]), low = Lanes::widen(lowest_of[c]), small = Lanes::widen(smallest_of[c]);
            const uint32_t a = high & 0x7FFFFFFFu, b = low & 0x7FFFFFFFu, magnitude = a > b ? a : b, before = bits_of(amax[c]);
            amax[c] = float_of(magnitude > before ? magnitude : before);
            sums[c] += double(squares_of[c]);
            total += aboves_of[c];
            extremes.highest = int32_t(high) > extremes.highest ? int32_t(high) : extremes.highest;
            extremes.lowest = low > extremes.lowest ? low : extremes.lowest;
            extremes.least = small < extremes.least ? small : extremes.least;
        }
        above_count += total;
    }
};

template <class Lanes>
void observe_rows(const QkColumns& m, const void* values, float above, const QkStatistics& statistics) {
    using Stored = typename Lanes::Stored;
    constexpr int COLUMNS = Tile<Lanes>::COLUMNS;
    const Stored* x = static_cast<const Stored*>(values);
    Tile<Lanes> tile(above);
    uint32_t largest = 0;
    for (int64_t first = 0; first < m.rows; first += CHUNK) {
        const int64_t rows = m.rows - first < CHUNK ? m.rows - first : CHUNK;
        for (int64_t row = 0; row < rows; ++row) tile.row_largest[row] = Lanes::broadcast(0);
        for (int64_t column = m.first_column; column < m.last_column; column += COLUMNS) {
            const Stored* from = x + first * m.row_stride + column;
            float* amax = statistics.channel_amax + column;
            double* sums = statistics.channel_sum_of_squares + column;
            const int64_t left = m.last_column - column;
            if (left >= COLUMNS) {
                const Stored* next = left > COLUMNS ? from + COLUMNS : x + (first + CHUNK) * m.row_stride + m.first_column;
                tile.template observe<true>(from, rows, m.row_stride, COLUMNS, amax, sums, next);
            } else {
                Stored rest[CHUNK * COLUMNS] = {};
                for (int64_t row = 0; row < rows; ++row) std::memcpy(rest + row * COLUMNS, from + row * m.row_stride, size_t(left) * sizeof *x);
                tile.template observe<false>(rest, rows, COLUMNS, int(left), amax, sums, rest);
            }
            if (tile.histogram.counted > Histogram::FULL) tile.histogram.empty_into(statistics.histogram);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const uint32_t magnitude = Lanes::widen(Lanes::largest(tile.row_largest[row]));
            statistics.row_magnitudes[first + row] = magnitude;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    tile.histogram.empty_into(statistics.histogram);
    if (tile.above.any) *statistics.above += tile.above_count;
    if (m.rows > 0 && m.first_column < m.last_column) tile.extremes.add_to(statistics.extremes, largest > INFINITY_BITS);
}

// histogram[bin(max over ranges)] += 1 for each row. magnitudes: [ranges, rows], as observe_rows writes them.
void count_magnitudes(const uint32_t* magnitudes, int64_t ranges, int64_t rows, int64_t* histogram) {
    for (int64_t row = 0; row < rows; ++row) {
        uint32_t largest = 0;
        for (int64_t range = 0; range < ranges; ++range) {
            const uint32_t magnitude = magnitudes[range * rows + row];
            largest = magnitude > largest ? magnitude : largest;
        }
        ++histogram[bin_of(largest)];
    }
}

}  // namespace

extern const QkRowKernels ROW_KERNELS;
const QkRowKernels ROW_KERNELS = {{observe_rows<BFloat16>, observe_rows<Float16>, observe_rows<Float32>}, count_magnitudes};

}  // namespace QK_LEVEL
