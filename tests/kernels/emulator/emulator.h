// kernels/cuda/hardware.h on the CPU: each thread of a block is a fiber, and what threads do together happens when the last of them has come.
//
// So the .cu files run as they are, with a C++ compiler and no GPU. The emulator keeps to the PTX ISA where a kernel can go wrong: fragments' layouts, the bits of
// wgmma's operands, the copy engine's swizzle and its zeros beyond the ends, phases and transaction counts of barriers. What the hardware does in the background is
// done as late as it may be (a copy when it is waited for or at some time before, wgmma when it is waited for) and what must not be read before then is poisoned.
// Threads run in an order that a seed decides, and hesitate at barriers. A block in which nobody can go on, or a wrong use, ends the launch with a fault.
// What it can't show: speed, true concurrency of memory (each access is seen at once by all), and an error in the reading of the ISA that it was written from.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define QK_ANYWHERE inline
#define QK_DEVICE inline
#define QK_ARCHITECTURE QK_EMULATED
#define QK_HAS_WGMMA (QK_EMULATED == 900)

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};

namespace emulator {

constexpr int FAULT = -100;
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned char POISON = 0xFF;  // NaN in E4M3 and bfloat16

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct TensorMap {
    const uint8_t* bytes;
    int64_t rows, columns, row_stride;
    int box_rows;
};

struct Copy {  // cp.async: 16 bytes, or zeros
    char* to;
    const char* from;
    bool valid;
};

// The sums of one thread while wgmma may be writing them: the registers themselves hold poison.
struct Shadow {
    std::vector<uint32_t> values;
    int pending = 0;
};

struct Wgmma {
    uint32_t* sums;
    int count;
    bool is_float, accumulate;
    uint64_t left, right;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = true, fenced = false;
    bool (*is_ready)(const void*) = nullptr;  // of what it waits for
    const void* condition = nullptr;
    Index index;
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> copy_groups;
    std::vector<Wgmma> issued;
    std::deque<std::vector<Wgmma>> wgmma_groups;
    std::map<uint32_t*, Shadow> shadows;
};

// A meeting of all threads of a warp, warpgroup or block.
struct Meeting {
    int arrived = 0;
    unsigned count = 0;
    const char* what = "";
    std::vector<void*> brought;
};

struct Box {  // a copy of the engine that is under way
    char* to;
    const TensorMap* map;
    uint64_t* barrier;
    int column, row;
};

struct State {
    int multiprocessors = 3;  // few, so that persistent blocks go around
    unsigned seed = 0;
    std::string fault;
    Index block, grid, threads;
    std::vector<Thread> fibers;
    Thread* self = nullptr;
    ucontext_t scheduler;
    std::function<void()> body;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Meeting> warps, warpgroups;
    Meeting all;
    std::vector<Box> boxes;
    uint64_t progress = 0;
    uint32_t random = 1;
};
inline State state;

inline uint32_t next_random() {
    state.random ^= state.random << 13, state.random ^= state.random >> 17, state.random ^= state.random << 5;
    return state.random;
}

inline void yield() { swapcontext(&state.self->context, &state.scheduler); }

// Ends the launch; does not return.
inline void fail(const std::string& what) {
    if (state.fault.empty()) {
        const Index& thread = state.self->index;
        state.fault = what + " (block " + std::to_string(state.block.x) + ", " + std::to_string(state.block.y) + ", thread " + std::to_string(thread.x) + ")";
    }
    for (;;) yield();
}

// The scheduler looks at the condition, and comes back when it holds.
template <class Condition>
void wait_until(Condition condition) {
    if (!condition()) {
        Thread& self = *state.self;
        self.condition = &condition;
        self.is_ready = [](const void* waited) { return (*static_cast<const Condition*>(waited))(); };
        yield();
        self.is_ready = nullptr;
    }
    ++state.progress;
}

// Where the hardware might let others go first. Without a seed they don't.
inline void hesitate() {
    if (!state.seed || next_random() % 2) return;
    ++state.progress;
    yield();
}

// perform(brought) is called once, by the last to come.
template <class Perform>
void meet(Meeting& meeting, int size, int place, const char* what, void* bring, Perform perform) {
    if (meeting.arrived && std::strcmp(meeting.what, what)) fail(std::string("threads that must act together do not: ") + meeting.what + " and " + what);
    meeting.what = what;
    meeting.brought.resize(size_t(size));
    meeting.brought[size_t(place)] = bring;
    if (++meeting.arrived == size) {
        perform(meeting.brought);
        meeting.arrived = 0, ++meeting.count, ++state.progress;
    } else {
        const unsigned before = meeting.count;
        wait_until([&] { return meeting.count != before; });
    }
}

template <class Perform>
void meet_warp(const char* what, void* bring, Perform perform) {
    const unsigned x = state.self->index.x;
    meet(state.warps[x / 32], 32, int(x % 32), what, bring, perform);
}

inline void check_shared(const void* pointer, size_t bytes) {
    const char* at = static_cast<const char*>(pointer);
    if (at < state.shared || at + bytes > state.shared + state.shared_bytes) fail("an access beyond shared memory");
}

// ---- Barriers: 16 bits of arrivals wanted, 15 of arrivals missing, 1 of phase, 32 of bytes missing.

struct BarrierBits {
    uint16_t wanted;
    uint16_t missing : 15, phase : 1;
    int32_t bytes;
};
static_assert(sizeof(BarrierBits) == 8);

inline BarrierBits& bits_of(uint64_t* barrier) {
    check_shared(barrier, 8);
    return *reinterpret_cast<BarrierBits*>(barrier);
}
inline void complete_phase(BarrierBits& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.missing = barrier.wanted;
    ++state.progress;
}

// ---- The copy engine.

// Byte c of row r of a box of 128 bytes' rows: bits 4-6 of the address are exchanged with bits 7-9 by exclusive or.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

inline uint32_t shared_address(const void* pointer);

inline void perform(const Box& box) {
    const uint32_t base = shared_address(box.to);
    for (int row = 0; row < box.map->box_rows; ++row)
        for (int column = 0; column < 128; ++column) {
            const int64_t from_row = box.row + row, from_column = box.column + column;
            const bool inside = from_row >= 0 && from_row < box.map->rows && from_column >= 0 && from_column < box.map->columns;
            const uint32_t at = swizzled(base + uint32_t(row * 128 + column));
            box.to[at - base] = inside ? char(box.map->bytes[from_row * box.map->row_stride + from_column]) : 0;
        }
    BarrierBits& barrier = bits_of(box.barrier);
    barrier.bytes -= box.map->box_rows * 128;
    complete_phase(barrier);
}

inline bool perform_boxes(bool all) {
    bool any = false;
    for (size_t i = 0; i < state.boxes.size();) {
        if (all || next_random() % 2) {
            perform(state.boxes[i]);
            state.boxes.erase(state.boxes.begin() + long(i)), any = true;
        } else {
            ++i;
        }
    }
    return any;
}

// ---- One block at a time, its fibers until all are done.

inline void enter() {
    state.body();
    state.self->done = true;
    ++state.progress;
    for (;;) yield();
}

inline void run_block() {
    const size_t threads = state.fibers.size();
    std::vector<size_t> order(threads);
    for (size_t i = 0; i < threads; ++i) order[i] = i;
    if (state.seed)
        for (size_t i = threads; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
    for (size_t i = 0; i < threads; ++i) {
        Thread& thread = state.fibers[i];
        auto stack = std::move(thread.stack);
        thread = Thread();
        thread.stack = stack ? std::move(stack) : std::make_unique<char[]>(STACK_BYTES);
        thread.done = false;
        thread.index = {unsigned(i), 0, 0};
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
    }
    state.warps.assign((threads + 31) / 32, {});
    state.warpgroups.assign((threads + 127) / 128, {});
    state.all = {};
    state.boxes.clear();
    for (bool alive = true; alive && state.fault.empty();) {
        const uint64_t before = state.progress;
        alive = false;
        for (const size_t i : order) {
            state.self = &state.fibers[i];
            if (state.self->done) continue;
            alive = true;
            if (state.self->is_ready && !state.self->is_ready(state.self->condition)) continue;
            swapcontext(&state.scheduler, &state.self->context);
            if (!state.fault.empty()) return;
        }
        if (!perform_boxes(false) && alive && state.progress == before && !perform_boxes(true)) {
            state.fault = "deadlock";
            for (const Meeting& warp : state.warps)
                if (warp.arrived) state.fault += std::string("; ") + warp.what + " of a warp has " + std::to_string(warp.arrived);
        }
    }
    if (state.fault.empty() && !state.boxes.empty()) state.fault = "a block ended with copies under way";
}

inline uint32_t shared_address(const void* pointer) {
    check_shared(pointer, 1);
    return 1024 + uint32_t(static_cast<const char*>(pointer) - state.shared);
}
inline const char* shared_pointer(uint32_t address, size_t bytes) {
    const char* pointer = state.shared + (int64_t(address) - 1024);
    check_shared(pointer, bytes);
    return pointer;
}

// ---- Numbers of the tensor cores.

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline float bfloat16(uint32_t x) { return float_of(x << 16); }
inline float float16(uint32_t x) {
    const uint32_t magnitude = x & 0x7FFF, sign = (x & 0x8000) << 16;
    float value = magnitude >= 0x7C00 ? (magnitude & 0x3FF ? NAN : INFINITY) : magnitude < 0x400 ? std::ldexp(float(magnitude), -24) : float_of((magnitude << 13) + (112u << 23));
    return sign ? -value : value;
}
inline float e4m3_of(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float value = exponent == 15 && mantissa == 7 ? NAN : exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return code & 0x80 ? -value : value;
}
inline float e4m3(uint8_t code) {
    static const std::vector<float> values = [] {
        std::vector<float> all;
        for (int i = 0; i < 256; ++i) all.push_back(e4m3_of(i));
        return all;
    }();
    return values[code];
}
// Round to nearest even, by the library's own arithmetic: a check on numbers.h, not a copy of it.
inline uint16_t to_bfloat16(double x) {
    if (std::isnan(x)) return 0x7FC0;
    int exponent;
    std::frexp(x, &exponent);
    const int unit = std::max(exponent - 8, -133);
    const float rounded = float(std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit));
    return uint16_t(__builtin_bit_cast(uint32_t, std::copysign(rounded, float(x))) >> 16);
}
inline uint16_t to_float16(double x) {
    if (std::isnan(x)) return 0x7E00;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    int exponent;
    std::frexp(x, &exponent);
    const int unit = std::max(exponent - 11, -24);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
    if (rounded >= 65520) return sign | 0x7C00;
    if (rounded < 0x1p-14) return uint16_t(sign | uint16_t(std::ldexp(rounded, 24)));
    std::frexp(rounded, &exponent);
    return uint16_t(sign | (((exponent + 14) << 10) + (int(std::ldexp(rounded, 11 - exponent)) - 1024)));
}

template <class Sum>
struct Fragments {
    Sum* d;
    const uint32_t* a;
    uint32_t b[2];
};

// One warp's 16 x 8 sums over `depth` elements of `width` bytes, of which element(word, i) is the i-th of a word.
template <class Sum, class Element>
void multiply_fragments(const char* what, Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int width, Element element) {
    Fragments<Sum> own{d, a, {b0, b1}};
    meet_warp(what, &own, [&](const std::vector<void*>& brought) {
        const int of_word = 4 / width, depth = 32 / width;
        const auto lane = [&](int i) -> const Fragments<Sum>& { return *static_cast<Fragments<Sum>*>(brought[size_t(i)]); };
        // Words hold neighbours along K; four lanes make 16 bytes; then come the fragment's second 16 bytes.
        float left[16][32], right[8][32];
        for (int k = 0; k < depth; ++k) {
            const int t = k / of_word % 4, later = k / of_word / 4;
            for (int row = 0; row < 16; ++row) left[row][k] = float(element(lane(4 * (row % 8) + t).a[2 * later + row / 8], k % of_word));
            for (int column = 0; column < 8; ++column) right[column][k] = float(element(lane(4 * column + t).b[later], k % of_word));
        }
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                double sum = 0;
                for (int k = 0; k < depth; ++k) sum += double(left[row][k]) * double(right[column][k]);
                Sum& to = lane(4 * (row % 8) + column / 2).d[2 * (row / 8) + column % 2];
                to = Sum(double(to) + sum);
            }
    });
}

// ---- wgmma.

template <class Sum>
void issue_wgmma(Sum* d, int count, uint64_t left, uint64_t right, bool accumulate) {
    Thread& self = *state.self;
    if (!self.fenced) fail("wgmma without a fence before it");
    uint32_t* sums = reinterpret_cast<uint32_t*>(d);
    Shadow& shadow = self.shadows[sums];
    if (!shadow.pending) shadow.values.assign(sums, sums + count);
    ++shadow.pending;
    std::memset(sums, POISON, size_t(count) * 4);
    self.issued.push_back({sums, count, std::is_same<Sum, float>::value, accumulate, left, right});
}

// Row r of an operand, bytes 0 .. 31: eight rows of 128 bytes are an atom; the swizzle is of the address.
inline void operand_row(uint64_t operand, int row, uint8_t (&bytes)[32]) {
    const uint32_t start = uint32_t(operand & 0x3FFF) << 4, between = uint32_t(operand >> 32 & 0x3FFF) << 4;
    if (operand >> 62 != 1 || (operand >> 49 & 7) != 0) fail("an operand of wgmma that is not of 128-byte swizzle");
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t at = start + uint32_t(row / 8) * between + uint32_t(row % 8) * 128 + i;
        bytes[i] = uint8_t(*shared_pointer(swizzled(at), 1));
    }
}

inline void perform_wgmma(const std::vector<void*>& threads, size_t op) {
    const auto of = [&](size_t i) -> const Wgmma& { return static_cast<Thread*>(threads[i])->wgmma_groups.front()[op]; };
    const Wgmma& first = of(0);
    const int columns = first.count * 2;
    std::vector<std::vector<uint8_t>> sides[2];
    for (int side = 0; side < 2; ++side)
        for (int row = 0; row < (side ? columns : 64); ++row) {
            uint8_t bytes[32];
            operand_row(side ? first.right : first.left, row, bytes);
            sides[side].emplace_back(bytes, bytes + 32);
        }
    std::vector<float> left(64 * 32), right(size_t(columns) * 32);
    const auto decoded = [&](uint8_t code) { return first.is_float ? e4m3(code) : float(int8_t(code)); };
    for (size_t i = 0; i < left.size(); ++i) left[i] = decoded(sides[0][i / 32][i % 32]);
    for (size_t i = 0; i < right.size(); ++i) right[i] = decoded(sides[1][i / 32][i % 32]);
    for (size_t i = 0; i < 128; ++i) {
        const Wgmma& own = of(i);
        if (own.left != first.left || own.right != first.right || own.accumulate != first.accumulate || own.count != first.count)
            fail("the threads of a warpgroup issue different wgmma");
        Shadow& shadow = static_cast<Thread*>(threads[i])->shadows[own.sums];
        --shadow.pending;
        for (int j = 0; j < own.count; ++j) {
            const size_t row = i / 32 * 16 + i % 32 / 4 + size_t(j / 2 % 2 * 8), column = size_t(j / 4 * 8) + i % 4 * 2 + size_t(j % 2);
            float sum = 0;  // exact for codes of INT8: below 2^20
            for (size_t k = 0; k < 32; ++k) sum += left[row * 32 + k] * right[column * 32 + k];
            uint32_t& value = shadow.values[size_t(j)];
            if (own.is_float) value = __builtin_bit_cast(uint32_t, own.accumulate ? float_of(value) + sum : sum);
            else value = (own.accumulate ? value : 0u) + uint32_t(int32_t(sum));
        }
    }
}

inline void wait_wgmma(size_t left) {
    const unsigned x = state.self->index.x;
    meet(state.warpgroups[x / 128], 128, int(x % 128), "wgmma.wait_group", state.self, [&](const std::vector<void*>& threads) {
        while (static_cast<Thread*>(threads[0])->wgmma_groups.size() > left) {
            const size_t ops = static_cast<Thread*>(threads[0])->wgmma_groups.front().size();
            for (size_t op = 0; op < ops; ++op) perform_wgmma(threads, op);
            for (void* thread : threads) static_cast<Thread*>(thread)->wgmma_groups.pop_front();
        }
        for (void* thread : threads) {
            auto& shadows = static_cast<Thread*>(thread)->shadows;
            for (auto at = shadows.begin(); at != shadows.end();) {
                if (at->second.pending) {
                    ++at;
                } else {
                    std::memcpy(at->first, at->second.values.data(), at->second.values.size() * 4);
                    at = shadows.erase(at);
                }
            }
        }
    });
    state.self->fenced = false;
}

}  // namespace emulator

#define threadIdx (emulator::state.self->index)
#define blockIdx (emulator::state.block)
#define blockDim (emulator::state.threads)
#define gridDim (emulator::state.grid)

inline void __syncthreads() {
    emulator::hesitate();
    emulator::meet(emulator::state.all, int(emulator::state.fibers.size()), int(threadIdx.x), "__syncthreads", nullptr, [](const auto&) {});
}
inline void __syncwarp() {
    emulator::meet_warp("__syncwarp", nullptr, [](const auto&) {});
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int distance) {
    struct Exchange {
        uint32_t sent, came;
        int distance;
    } own{value, 0, distance};
    emulator::meet_warp("__shfl_xor_sync", &own, [](const std::vector<void*>& brought) {
        for (size_t lane = 0; lane < 32; ++lane) {
            Exchange& exchange = *static_cast<Exchange*>(brought[lane]);
            exchange.came = static_cast<Exchange*>(brought[lane ^ size_t(exchange.distance)])->sent;
        }
    });
    return own.came;
}

namespace hw {

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int round_to_int(float x) { return int(std::nearbyint(x)); }
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline uint32_t pair_of(uint16_t first, uint16_t second) { return first | uint32_t(second) << 16; }
inline uint32_t multiply_float16_pair(uint32_t a, uint32_t b) {
    const auto half = [&](int shift) { return emulator::to_float16(double(emulator::float16(a >> shift & 0xFFFF)) * double(emulator::float16(b >> shift & 0xFFFF))); };
    return pair_of(half(0), half(16));
}
inline uint32_t multiply_bfloat16_pair(uint32_t a, uint32_t b) {
    const auto half = [&](int shift) { return emulator::to_bfloat16(double(emulator::bfloat16(a >> shift & 0xFFFF)) * double(emulator::bfloat16(b >> shift & 0xFFFF))); };
    return pair_of(half(0), half(16));
}
inline uint32_t subtract_bfloat16_pair(uint32_t a, uint32_t b) {
    const auto half = [&](int shift) { return emulator::to_bfloat16(double(emulator::bfloat16(a >> shift & 0xFFFF)) - double(emulator::bfloat16(b >> shift & 0xFFFF))); };
    return pair_of(half(0), half(16));
}

inline char* shared_memory() { return emulator::state.shared; }
inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
inline uint4 load_once(const void* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) emulator::fail("a load of 16 bytes that is not aligned");
    uint4 x;
    std::memcpy(&x, pointer, 16);
    return x;
}
inline uint4 load_cached(const void* pointer) { return load_once(pointer); }

inline void copy_async(void* shared, const void* global, bool valid) {
    emulator::check_shared(shared, 16);
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16)) emulator::fail("cp.async of 16 bytes that are not aligned");
    std::memset(shared, emulator::POISON, 16);
    emulator::state.self->copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), valid});
}
inline void copy_async_commit() {
    auto& self = *emulator::state.self;
    self.copy_groups.push_back(std::move(self.copies));
    self.copies.clear();
}
template <int left>
void copy_async_wait() {
    auto& groups = emulator::state.self->copy_groups;
    for (; groups.size() > size_t(left); groups.pop_front())
        for (const emulator::Copy& copy : groups.front()) {
            if (copy.valid) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
}

inline void load_matrices(uint32_t (&x)[4], const void* row) {
    struct Lane {
        uint32_t* x;
        const char* row;
    } own{x, static_cast<const char*>(row)};
    emulator::check_shared(row, 16);
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix of a row that is not aligned");
    emulator::meet_warp("ldmatrix", &own, [](const std::vector<void*>& brought) {
        for (size_t lane = 0; lane < 32; ++lane)
            for (size_t matrix = 0; matrix < 4; ++matrix)
                std::memcpy(static_cast<Lane*>(brought[lane])->x + matrix, static_cast<Lane*>(brought[8 * matrix + lane / 4])->row + 4 * (lane % 4), 4);
    });
}
inline void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_fragments("mma s8", d, a, b0, b1, 1, [](uint32_t word, int i) { return int8_t(word >> 8 * i); });
}
inline void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_fragments("mma e4m3", d, a, b0, b1, 1, [](uint32_t word, int i) { return emulator::e4m3(uint8_t(word >> 8 * i)); });
}
inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_fragments("mma f16", d, a, b0, b1, 2, [](uint32_t word, int i) { return emulator::float16(word >> 16 * i & 0xFFFF); });
}
inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_fragments("mma bf16", d, a, b0, b1, 2, [](uint32_t word, int i) { return emulator::bfloat16(word >> 16 * i & 0xFFFF); });
}

using TensorMap = emulator::TensorMap;
using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
    auto& bits = emulator::bits_of(barrier);
    bits.wanted = uint16_t(arrivals), bits.missing = arrivals & 0x7FFF, bits.phase = 0, bits.bytes = 0;
}
inline void barrier_init_done() {}
inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
    auto& bits = emulator::bits_of(barrier);
    if (!bits.missing) emulator::fail("more arrivals at a barrier than it was made for");
    bits.bytes += int32_t(bytes), --bits.missing;
    emulator::complete_phase(bits);
}
inline void barrier_arrive(Barrier* barrier) {
    barrier_arrive_expecting(barrier, 0);
    emulator::hesitate();
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
    emulator::wait_until([&] { return emulator::bits_of(barrier).phase != parity; });
}
inline void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int column, int row) {
    const size_t bytes = size_t(map->box_rows) * 128;
    emulator::check_shared(shared, bytes);
    if (shared_address(shared) % 1024) emulator::fail("a swizzled box that does not begin on 1024 bytes");
    std::memset(shared, emulator::POISON, bytes);
    emulator::state.boxes.push_back({static_cast<char*>(shared), map, barrier, column, row});
}
inline void prefetch_map(const TensorMap*) {}
template <int count>
void give_registers() {}
template <int count>
void take_registers() {}
inline void wgmma_fence() { emulator::state.self->fenced = true; }
inline void wgmma_commit() {
    auto& self = *emulator::state.self;
    self.wgmma_groups.push_back(std::move(self.issued));
    self.issued.clear();
}
template <int left>
void wgmma_wait() {
    emulator::wait_wgmma(left);
}
template <class Sum, int COUNT>
void wgmma(Sum (&d)[COUNT], uint64_t left, uint64_t right, bool accumulate) {
    emulator::issue_wgmma(d, COUNT, left, right, accumulate);
}

struct Device {
    int architecture, multiprocessors;
};
inline const char* error_text(int) { return emulator::state.fault.c_str(); }
inline Device current_device() { return {QK_EMULATED / 10, emulator::state.multiprocessors}; }

struct Grid {
    unsigned x, y, z;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void*, const Arguments&... arguments) {
    auto& state = emulator::state;
    constexpr size_t GUARD = 1024;
    if (shared_bytes > 227 * 1024) return 1;
    std::unique_ptr<char[]> memory(new char[shared_bytes + 2048 + GUARD]);
    state.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 1023) / 1024 * 1024);
    state.shared_bytes = shared_bytes;
    state.fibers.resize(size_t(threads));
    state.threads = {unsigned(threads), 1, 1}, state.grid = {grid.x, grid.y, grid.z};
    state.body = [&] { kernel(arguments...); };
    state.fault.clear();
    state.random = state.seed * 2654435761u + 1u;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                state.block = {x, y, z};
                std::memset(state.shared, emulator::POISON, shared_bytes + GUARD);
                emulator::run_block();
                for (size_t i = 0; i < GUARD; ++i)
                    if (state.fault.empty() && static_cast<unsigned char>(state.shared[shared_bytes + i]) != emulator::POISON) state.fault = "a store beyond shared memory";
                if (!state.fault.empty()) return emulator::FAULT;
            }
    return 0;
}

inline int make_map(TensorMap* map, const void* bytes, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
    const bool is_right = rows > 0 && columns > 0 && reinterpret_cast<uintptr_t>(bytes) % 16 == 0 && row_stride % 16 == 0 && row_stride >= (rows > 1 ? columns : 0) && box_rows <= 256;
    *map = {static_cast<const uint8_t*>(bytes), rows, columns, row_stride, box_rows};
    return is_right ? 0 : 1;
}

}  // namespace hw
