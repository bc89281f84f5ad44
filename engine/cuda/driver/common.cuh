// Helpers every kernel file may use. It is prepended to each source as text, once.
// No CUDA header is included anywhere: a plain pip install has none, so half precision goes through inline PTX
// on 16-bit (one half) and 32-bit (two halves) integers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define WARP 32
#define FULL_MASK 0xffffffffu
#define DEVICE static __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// ---- programmatic dependent launch -------------------------------------------------------------------------
// Lets the next kernel of the stream start while this one runs. Nothing that this kernel writes is visible to it
// before its own pdl_wait() returns, which is when this whole grid has ended and its writes are flushed.
DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for every earlier kernel. Call it in every block before reading what an earlier kernel wrote and before
// overwriting what an earlier kernel may still read. Weights may be loaded before it.
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- half precision without headers ------------------------------------------------------------------------
DEVICE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE u16 float_to_half(float f) {  // round to nearest even; overflow gives infinity
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

DEVICE float bf16_to_float(u16 b) { return __uint_as_float((u32)b << 16); }

DEVICE u32 pack_halves(float low, float high) { return (u32)float_to_half(low) | ((u32)float_to_half(high) << 16); }

DEVICE float low_half(u32 pair) { return half_to_float((u16)(pair & 0xffffu)); }
DEVICE float high_half(u32 pair) { return half_to_float((u16)(pair >> 16)); }

// ---- reductions (fixed order: the same bits on every run) ----------------------------------------------------
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_MASK, v, offset);
    return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, offset));
    return v;
}

// Sum over the block, given to every thread. scratch: at least blockDim.x / 32 floats of shared memory.
// Two barriers; scratch may be reused after it returns.
DEVICE float block_sum(float v, float* scratch) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
    v = warp_sum(v);
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < warps; ++i) total += scratch[i];
    __syncthreads();
    return total;
}

// ---- memory --------------------------------------------------------------------------------------------------
// 16 bytes of read-only data that is used once: past L1, evicted first.
DEVICE uint4 load_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
