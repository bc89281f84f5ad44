// What decode_gemm.cu needs of Hopper: wgmma with the weights in registers, barriers, bulk copies, cluster memory.
//
// NT groups of 8 sequences. Operands of the activations lie in shared memory as core matrices of 8 sequences x 8 columns
// (128 bytes), [group of 8 sequences][first, second 8 columns] of a step of 16 columns.

constexpr int STEP_BYTES = NT * 256, SUMS_AT = 16 * STEP_BYTES, FLOATS_AT = 17 * STEP_BYTES;
constexpr int X_BYTES = operand_bytes(NT);  // of 256 columns
typedef float Sums[NT * 4];

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Matrix descriptor: address (18 bits of it: above them is the block's rank in its cluster), 128 bytes from one core matrix
// to the next along columns, 256 along sequences, no swizzle.
DEVICE u64 operand_at(u32 address) { return (u64)((address & 0x3ffffu) >> 4) | (8ull << 16) | (16ull << 32); }

#define ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC16(d, i) ACC4(d, i), ACC4(d, i + 4), ACC4(d, i + 8), ACC4(d, i + 12)
#define WGMMA(n, list, a0, a1, a2, a3, b, keep)                                                          \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" keep ", 0;\n"                                                    \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 {" list "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", p, 1, 1, 0;\n}"

// d (+)= weights (16 rows of each warp, 16 columns) * activations. keep 0: overwrites d.
DEVICE void wgmma(Sums& d, const u32* a, u64 b, int keep) {
#if __CUDA_ARCH__ == 900
#if NT == 1
    asm volatile(WGMMA("8", "%0,%1,%2,%3", "4", "5", "6", "7", "8", "9")
                 : ACC4(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#elif NT == 2
    asm volatile(WGMMA("16", "%0,%1,%2,%3,%4,%5,%6,%7", "8", "9", "10", "11", "12", "13")
                 : ACC4(d, 0), ACC4(d, 4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#elif NT == 4
    asm volatile(WGMMA("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "16", "17", "18", "19", "20", "21")
                 : ACC16(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#else
    asm volatile(WGMMA("64",
                       "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                       "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                       "32", "33", "34", "35", "36", "37")
                 : ACC16(d, 0), ACC16(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
#endif
#endif
}
// Keeps the compiler from moving uses of what wgmma reads or writes over a fence or a wait.
DEVICE void keep_order(Sums& d) {
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) asm volatile("" : "+f"(d[i]));
}
DEVICE void keep_order(u32 (&a)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+r"(a[i]));
}
DEVICE void wgmma_fence() {
#if __CUDA_ARCH__ == 900
    asm volatile("wgmma.fence.sync.aligned;");
#endif
}
DEVICE void wgmma_commit() {
#if __CUDA_ARCH__ == 900
    asm volatile("wgmma.commit_group.sync.aligned;");
#endif
}
template <int LEFT>
DEVICE void wgmma_wait() {
#if __CUDA_ARCH__ == 900
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT));
#endif
}

// ---- the same with the instructions of single warps, faster for few sequences --------------------------------
// Four core matrices, lane by lane 16 bytes of them behind each other.
DEVICE void load_matrices(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address));
}
DEVICE void multiply(float* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d += weights (16 rows, 16 columns) * activations; address: of this lane.
DEVICE void add_step(Sums& d, const u32* a, u32 address) {
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        u32 b[4];
        load_matrices(b, address + j * 256);  // with one group of sequences, the second half is not looked at
        multiply(d + j * 4, a, b[0], b[1]);
        if (NT > 1) multiply(d + (NT > 1 ? j * 4 + 4 : 0), a, b[2], b[3]);
    }
}
DEVICE void add_two_steps(Sums& d, const u32 (&a)[8], u32 address) {
    if (NT > 1) {
        add_step(d, a, address);
        add_step(d, a + 4, address + STEP_BYTES);
    } else {
        u32 b[4];
        load_matrices(b, address);
        multiply(d, a, b[0], b[1]);
        multiply(d, a + 4, b[2], b[3]);
    }
}

// ---- barriers and copies -------------------------------------------------------------------------------------
DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni over;\n"
        "bra.uni again;\nover:\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}
template <bool ONCE>  // data that is read once leaves the L2 first
DEVICE void bulk_copy(u32 to, const u8* from, u32 bytes, u32 barrier) {
    if (ONCE)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
            "l"(from), "r"(bytes), "r"(barrier), "l"(0x12f0000000000000ull)
            : "memory");
    else
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                     "l"(from), "r"(bytes), "r"(barrier)
                     : "memory");
}
// Shared memory written by this thread becomes visible to wgmma.
DEVICE void publish_operand() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- clusters ------------------------------------------------------------------------------------------------
DEVICE int cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_barrier() { cluster_arrive(), cluster_wait(); }
DEVICE float float_from_rank(u32 address, int rank) {
    u32 there;
    float v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
    return v;
}
DEVICE float4 load_from_rank(u32 address, int rank) {
    u32 there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
}

// A warp group gives registers back, or takes what others gave.
template <int COUNT>
DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
