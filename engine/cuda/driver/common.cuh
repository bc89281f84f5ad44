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
// The shared memory whose size a launch gives; on the host, tests give it another meaning.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
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

DEVICE u32 pack_halves(float low, float high) { return (u32)float_to_half(low) | ((u32)float_to_half(high) << 16); }

// Two floats as a pair of halves in one instruction where there is one (conversions are slow: 16 a clock and
// multiprocessor).
DEVICE u32 two_halves(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return pack_halves(low, high);
#endif
}

// Saturates: an infinity would turn a whole row of a product into NaN. NaN stays: rows of no numbers must be seen as such.
DEVICE u16 saturated_half(float f) {
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(f) : "f"(-65504.0f));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(f) : "f"(65504.0f));
    return float_to_half(f);
#else
    return float_to_half(f != f ? f : fminf(fmaxf(f, -65504.0f), 65504.0f));
#endif
}

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

// ---- tensor cores --------------------------------------------------------------------------------------------
// d += a * b: a 16x16 (rows), b 16x8 (columns), float32 sums. With g = lane/4, t = lane%4 the lane holds
// a0 = (row g, k 2t..2t+1), a1 = (row g+8, same), a2 = (row g, k 2t+8..), a3 = (row g+8, k 2t+8..),
// b0 = (k 2t..2t+1, column g), b1 = (k 2t+8.., column g), d0,d1 = (row g, columns 2t, 2t+1), d2,d3 = row g+8.
DEVICE void mma16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// d += a * b: a 16x8 (rows), b 8x8 (columns), float32 of which the tensor cores read the first 11 bits of the fraction
// (TF32), float32 sums. The lane holds a0 = (row g, k t), a1 = (row g+8, k t), a2 = (row g, k t+4), a3 = (row g+8, k t+4),
// b0 = (k t, column g), b1 = (k t+4, column g), d as in mma16. From compute capability 8.0 on; before, d stays as it is.
DEVICE void mma8(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

// Four 8x8 matrices from shared memory; each lane gives the address of one row of 16 bytes.
DEVICE void load_matrix4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void load_matrix4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// ---- memory --------------------------------------------------------------------------------------------------
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barrier of some of the block's warps: wait for the others, or only be counted.
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 16 bytes of read-only data that is used once: past L1, evicted first.
DEVICE uint4 load_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// BYTES (4, 8 or 16) from global to shared memory in the background; zeros where !valid.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    const int n = valid ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                     "r"(n)
                     : "memory");
#else
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) ((u32*)to)[i] = valid ? ((const u32*)from)[i] : 0u;
#endif
}

DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's committed groups are still under way.
template <int PENDING>
DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
