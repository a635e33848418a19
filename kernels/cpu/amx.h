// Tiles of Intel's AMX: eight registers of 16 rows of 64 bytes. Only in files compiled for it.
//
// The compiler's own intrinsics don't say that they read and write memory, so a store before a tile load may be moved behind it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace QK_LEVEL {
namespace amx {

constexpr int ROWS = 16, ROW_BYTES = 64;

// A thread's tile registers, all of the full size, for as long as this lives.
struct Registers {
    Registers() {
        alignas(64) uint8_t configuration[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            const uint16_t row_bytes = ROW_BYTES;
            std::memcpy(configuration + 16 + 2 * tile, &row_bytes, 2);
            configuration[48 + tile] = ROWS;
        }
        asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
    }
    ~Registers() { asm volatile("tilerelease" ::: "memory"); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
};

#define QK_TILE_LOAD(tile, pointer, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(pointer), "r"(int64_t(stride)) : "memory")
#define QK_TILE_STORE(tile, pointer, stride) asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(pointer), "r"(int64_t(stride)) : "memory")
#define QK_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::: "memory")
// sum += a b: signed bytes by unsigned ones, or pairs of bfloat16. In AT&T's order of operands: b, a, sum.
#define QK_TILE_INT8(sum, a, b) asm volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::: "memory")
#define QK_TILE_BFLOAT16(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::: "memory")

struct Int8 {
    static constexpr int INNER = 64;
#define QK_STEP(sum, a, b) QK_TILE_INT8(sum, a, b)
#include "amx_tiles.inc"
#undef QK_STEP
};

struct BFloat16 {
    static constexpr int INNER = 32;
#define QK_STEP(sum, a, b) QK_TILE_BFLOAT16(sum, a, b)
#include "amx_tiles.inc"
#undef QK_STEP
};

}  // namespace amx
}  // namespace QK_LEVEL
