// What the kernels ask of the hardware, and nothing else does: PTX instructions, launches, tensor maps, properties of the device.
//
// With QK_EMULATED (an architecture such as 900) the same functions come from tests/kernels/emulator/emulator.h, which runs a kernel's threads as fibers
// on the CPU; so the .cu files are compiled by a C++ compiler and checked without a GPU. Facts are those of the PTX ISA 9.0.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef QK_EMULATED

#include "emulator.h"

#else

#include <cuda.h>  // types alone: the library doesn't link libcuda
#include <cuda_runtime.h>

#define QK_ANYWHERE __host__ __device__ __forceinline__
#define QK_DEVICE __device__ __forceinline__
#ifdef __CUDA_ARCH__
#define QK_ON_DEVICE
#define QK_ARCHITECTURE __CUDA_ARCH__
#define QK_EITHER(on_device, on_host) return on_device;
#else
#define QK_ARCHITECTURE 0
#define QK_EITHER(on_device, on_host) return on_host;
#endif
// wgmma and setmaxnreg are in the code for sm_90a alone.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QK_HAS_WGMMA 1
#else
#define QK_HAS_WGMMA 0
#endif

namespace hw {

// ---- Numbers. The _rn forms are never contracted to fused multiply-adds.

QK_ANYWHERE float float_of(uint32_t bits) { QK_EITHER(__uint_as_float(bits), __builtin_bit_cast(float, bits)) }
QK_ANYWHERE uint32_t bits_of(float value) { QK_EITHER(__float_as_uint(value), __builtin_bit_cast(uint32_t, value)) }
QK_ANYWHERE float add(float a, float b) { QK_EITHER(__fadd_rn(a, b), a + b) }
QK_ANYWHERE float multiply(float a, float b) { QK_EITHER(__fmul_rn(a, b), a * b) }
QK_ANYWHERE float divide(float a, float b) { QK_EITHER(__fdiv_rn(a, b), a / b) }
QK_ANYWHERE float multiply_add(float a, float b, float c) { QK_EITHER(__fmaf_rn(a, b, c), __builtin_fmaf(a, b, c)) }
QK_ANYWHERE int round_to_int(float x) { QK_EITHER(__float2int_rn(x), int(__builtin_nearbyintf(x))) }

QK_DEVICE float float16_to_float(uint16_t x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
}
QK_DEVICE uint16_t float_to_float16(float x) {
    uint16_t value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value) : "f"(x));
    return value;
}
QK_DEVICE uint16_t float_to_bfloat16(float x) {
    uint16_t value;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value) : "f"(x));
    return value;
}
// Byte i of the result is byte s_i of b:a, s_i being the i-th nibble of the selector.
QK_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
QK_DEVICE uint32_t multiply_float16_pair(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
// sm_80 has no other arithmetic of bfloat16 than the fused multiply-add: times b plus -0, and times -1.
QK_DEVICE uint32_t multiply_bfloat16_pair(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
QK_DEVICE uint32_t subtract_bfloat16_pair(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    return difference;
}

// ---- Memory.

// The block's dynamic shared memory, aligned to 1024 bytes: the period of the 128-byte swizzle.
QK_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
QK_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes that are read once: they don't displace what the L1 cache holds.
QK_DEVICE uint4 load_once(const void* pointer) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(pointer));
    return x;
}
QK_DEVICE uint4 load_cached(const void* pointer) { return __ldg(static_cast<const uint4*>(pointer)); }

// 16 bytes from global to shared memory in the background; zeros if not `valid` (the address is not read then).
QK_DEVICE void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
QK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` of this thread's groups are under way.
template <int left>
QK_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// ---- Tensor cores, a warp at a time. Lane l = 4 g + t. A fragment of bytes: a[0] row g, bytes 4t..4t+3; a[1] row g+8; a[2], a[3] the same 16 bytes further.
// B: b[0] column g, bytes 4t..; b[1] 16 bytes further. Sums: d[0], d[1] row g, columns 2t, 2t+1; d[2], d[3] row g+8. Of 16-bit elements likewise.

// Four 8 x 16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8, and gets bytes 4t.. of row g of each.
QK_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}
QK_DEVICE void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QK_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QK_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#if QK_ARCHITECTURE >= 890
QK_DEVICE void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- Hopper: barriers in shared memory, the copy engine, tensor cores a warpgroup (four warps) at a time.

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

#if QK_HAS_WGMMA
QK_DEVICE void barrier_init(Barrier* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialized barriers known to the copy engine.
QK_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
QK_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for so many bytes of copies too.
QK_DEVICE void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. Of a new barrier, phase 0 is under way, and that before it (parity 1) is over.
QK_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nbra again;\nover:\n}\n" ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
// The box of `map` that begins at byte `column` of row `row`, to shared memory, zeros where it reaches beyond the tensor; then its bytes are counted at the barrier.
QK_DEVICE void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
                 "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row)
                 : "memory");
}
QK_DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}
template <int count>
QK_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
QK_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
// Before a warpgroup's first wgmma after other accesses to its sums.
QK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
QK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
#include "wgmma_instructions.inc"
#endif

// ---- The host's side.

// Major and minor digit, 90 for Hopper; multiprocessors.
struct Device {
    int architecture, multiprocessors;
};

inline Device current_device() {
    constexpr int MOST = 64;
    static Device known[MOST];  // written with the same values whoever comes first
    int index = 0;
    if (cudaGetDevice(&index) != cudaSuccess || index >= MOST) return {};
    if (!known[index].architecture) {
        int major = 0, minor = 0, processors = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
        known[index].multiprocessors = processors;
        known[index].architecture = 10 * major + minor;
    }
    return known[index];
}

struct Grid {
    unsigned x, y, z;
};

inline const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

// 0 or CUDA's error. Neither synchronizes nor allocates, so a stream may be under capture.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void* stream, const Arguments&... arguments) {
    if (shared_bytes > 48 * 1024) {  // more than that has to be asked for
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return int(error);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return int(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// A map of a matrix of bytes [rows, columns], rows row_stride bytes apart (a multiple of 16), for boxes of box_rows x 128 bytes. 0 or an error.
inline int make_map(TensorMap* map, const void* bytes, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (!encode) {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return error != cudaSuccess ? int(error) : int(cudaErrorNotSupported);
        encode = reinterpret_cast<Encode>(entry);
    }
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row_stride)};
    const cuuint32_t box[2] = {128, cuuint32_t(box_rows)}, steps[2] = {1, 1};
    return int(encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(bytes), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

}  // namespace hw

#endif

namespace hw {

// What wgmma reads: rows of 128 bytes of K, eight to an atom of 1024 bytes, swizzled as the copy engine writes them with SWIZZLE_128B. Bits 0-13: address / 16;
// 32-45: bytes between atoms / 16; 62-63: 1, the 128-byte swizzle. (16-29, between atoms along K, has no meaning here: K ends with the atom.)
QK_DEVICE uint64_t wgmma_operand(const void* shared) {
    return uint64_t((shared_address(shared) & 0x3FFFFu) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace hw
