// Hopper's asynchronous matrix products (wgmma) and the barriers that feed them; compute capability 9.0 only.
//
// One operation belongs to a warpgroup: 128 threads, 64 rows. Lane l of warp w holds of the sums, with g = l / 4 and
// t = l % 4: d[4j], d[4j+1] = row 16w + g, columns 8j + 2t, 8j + 2t + 1; d[4j+2], d[4j+3] = the same of row 16w + g + 8.
// An operand in shared memory is stored in blocks of [rows][64 float16], 1024-byte aligned; 16-byte chunk c of row r
// lies at chunk c ^ (r % 8) of the row ("128-byte swizzle"). Needs attention_common.cuh.

#define BLOCK_ROW 128  // bytes

DEVICE u32 swizzled(int row, int chunk) { return row * BLOCK_ROW + ((chunk ^ (row & 7)) << 4); }

// Descriptor of such an operand from a shared address; `stride` bytes from one block to the next, which only an operand
// whose rows run along the sum (the transposed one) needs. Eight rows are 1024 bytes.
DEVICE u64 matrix_at(u32 address, u32 stride) {
    return (u64)(address >> 4) | (u64)(stride >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Tells the compiler that these registers change here: it may not move their uses over a wait.
template <int N>
DEVICE void touch(float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

#define NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES16 NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES32 NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES64                                                                                                      \
    NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
            "%58,%59,%60,%61,%62,%63"
#define SUMS8(d)                                                                                             \
    "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3]), "+f"((d)[4]), "+f"((d)[5]), "+f"((d)[6]), "+f"((d)[7])
#define SUMS16(d) SUMS8(d), SUMS8((d) + 8)
#define SUMS32(d) SUMS16(d), SUMS16((d) + 16)
#define SUMS64(d) SUMS32(d), SUMS32((d) + 32)

// d (64 x N) = a b^T, or += where `add`: a 64 rows, b N rows of 16 elements, both in shared memory.
#define PRODUCT_OF_SHARED(N, REGISTERS, A, B, ADD)                                                               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD                                                            \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES##REGISTERS "}, " A ", " B \
                 ", p, 1, 1, 0, 0;}"                                                                             \
                 : SUMS##REGISTERS(d)                                                                            \
                 : "l"(a), "l"(b), "r"((int)add))

template <int N>
DEVICE void product(float* d, u64 a, u64 b, bool add) {
    static_assert(N == 64 || N == 128, "a width that is written out below");
    if constexpr (N == 64) PRODUCT_OF_SHARED(64, 32, "%32", "%33", "%34");
    if constexpr (N == 128) PRODUCT_OF_SHARED(128, 64, "%64", "%65", "%66");
}

// d (64 x N) += a b: a 64 x 16 in registers (laid out as mma16's), b 16 rows of N elements in shared memory.
#define PRODUCT_OF_REGISTERS(N, REGISTERS, A0, A1, A2, A3, B)                                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N              \
                 "k16.f32.f16.f16 {" NAMES##REGISTERS "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 1;}" \
                 : SUMS##REGISTERS(d)                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <int N>
DEVICE void product_transposed(float* d, const u32* a, u64 b) {
    static_assert(N == 16 || N == 32 || N == 64 || N == 128, "a width that is written out below");
    if constexpr (N == 16) PRODUCT_OF_REGISTERS(16, 8, "%8", "%9", "%10", "%11", "%12");
    if constexpr (N == 32) PRODUCT_OF_REGISTERS(32, 16, "%16", "%17", "%18", "%19", "%20");
    if constexpr (N == 64) PRODUCT_OF_REGISTERS(64, 32, "%32", "%33", "%34", "%35", "%36");
    if constexpr (N == 128) PRODUCT_OF_REGISTERS(128, 64, "%64", "%65", "%66", "%67", "%68");
}

// ---- barriers ------------------------------------------------------------------------------------------------
DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// This thread arrives once everything it has copied asynchronously so far is there.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_wait(u32 barrier, int phase) {
    asm volatile(
        "{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE: }" ::"r"(
            barrier),
        "r"(phase)
        : "memory");
}

// What ordinary instructions wrote to shared memory is seen by the matrix products that follow.
DEVICE void order_before_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barrier of some of the block's warps: wait for it, or only be counted.
DEVICE void group_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void group_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int REGISTERS>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
