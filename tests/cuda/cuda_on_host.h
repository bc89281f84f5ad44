// What kernel files without communication between threads need to be compiled as C++ for the CPU, in place of common.cuh.
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static inline
#define FULL_MASK 0xffffffffu
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Dimensions {
    int x = 1, y = 1, z = 1;
};
static Dimensions threadIdx, blockIdx, blockDim, gridDim;

struct int4 { int x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

template <class To, class From>
static To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static float __uint_as_float(u32 v) { return bits_of<float>(v); }
static float __int_as_float(int v) { return bits_of<float>(v); }
static u32 __float_as_uint(float v) { return bits_of<u32>(v); }
static float half_to_float(u16 h) { return (float)bits_of<_Float16>(h); }
static u16 float_to_half(float f) { return bits_of<u16>((_Float16)f); }
static u16 saturated_half(float f) { return float_to_half(f != f ? f : std::fmin(std::fmax(f, -65504.0f), 65504.0f)); }
static float low_half(u32 pair) { return half_to_float((u16)pair); }
static float high_half(u32 pair) { return half_to_float((u16)(pair >> 16)); }
static u32 pack_halves(float low, float high) { return float_to_half(low) | ((u32)float_to_half(high) << 16); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static int __popc(u32 v) { return __builtin_popcount(v); }
static u32 __funnelshift_r(u32 low, u32 high, int by) { return (u32)((((u64)high << 32) | low) >> (by & 31)); }
static u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = ((u64)b << 32) | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 place = (selector >> (4 * i)) & 15u;
        assert(place < 8);  // beyond that, the instruction repeats a sign
        result |= (u32)((both >> (8 * place)) & 255u) << (8 * i);
    }
    return result;
}
// Pairs of halfs: what half_pairs.cuh does in assembly.
template <class Function>
static u32 each_half(u32 a, u32 b, Function f) {
    return pack_halves(f(low_half(a), low_half(b)), f(high_half(a), high_half(b)));
}
static u32 add_halves(u32 a, u32 b) { return each_half(a, b, [](float x, float y) { return x + y; }); }
static u32 mul_halves(u32 a, u32 b) { return each_half(a, b, [](float x, float y) { return x * y; }); }
static u32 fma_halves(u32 a, u32 b, u32 c) { return add_halves(mul_halves(a, b), c); }  // where the product is exact
static u32 and_or(u32 v, u32 mask, u32 magic) { return (v & mask) | magic; }
static u32 hidden(u32 v) { return v; }
static u32 twice(u32 pair, int high) { return (high ? pair >> 16 : pair & 0xffffu) * 0x10001u; }
static u32 two_halves(float low, float high) { return pack_halves(low, high); }
static void pdl_wait() {}
static void pdl_launch() {}
#ifndef THREADS_MEET  // these are in kernels that are compiled and not run
static u32 __shfl_sync(u32, u32 v, int) { return v; }
static u32 __shfl_xor_sync(u32, u32 v, int) { return v; }
static void atomicMax(u32*, u32) {}
#endif

template <class Run>
static void launch(int grid_x, int grid_y, int threads, Run run) {
    gridDim.x = grid_x, gridDim.y = grid_y, blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) run();
}
