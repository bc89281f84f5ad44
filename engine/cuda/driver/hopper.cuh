// Hopper's asynchronous instructions (compute capability 9.0 only): barriers in shared memory, bulk copies, clusters,
// matrix products (wgmma), and registers that warpgroups hand to each other.
//
// Addresses of shared memory are 32-bit (shared_address()). Every kernel file that runs on Hopper takes them from here.

// ---- barriers in shared memory -------------------------------------------------------------------------------
DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that this thread has initialized are seen by copies and by other blocks of the cluster.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and `bytes` that bulk copies will bring.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// This thread arrives once everything it has copied asynchronously (cp.async) so far is there.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// At the same barrier of block `rank` of the cluster.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\nbra.uni again;\nover:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The same for a whole cluster: what a thread did in shared memory of the cluster before it arrives is seen by those that
// wait.
DEVICE void barrier_arrive_cluster(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
DEVICE void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\nbra.uni again;\nover:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- bulk copies from global memory; the barrier counts the bytes ---------------------------------------------
// ONCE: data that is read once leaves the L2 first.
template <bool ONCE>
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
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

// To the same address, and the same barrier, of every block of the mask.
DEVICE void bulk_copy_to_cluster(u32 to, const void* from, u32 bytes, u32 barrier, u16 mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
        : "memory");
}

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

// ---- registers -----------------------------------------------------------------------------------------------
// A warpgroup takes registers that others gave back, or gives some back: from now on it has COUNT a thread.
template <int COUNT>
DEVICE void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- matrix products -----------------------------------------------------------------------------------------
// One operation belongs to a warpgroup: 128 threads, 64 rows. Lane l of warp w holds of the sums, with g = l / 4 and
// t = l % 4: d[4j], d[4j+1] = row 16w + g, columns 8j + 2t, 8j + 2t + 1; d[4j+2], d[4j+3] = the same of row 16w + g + 8.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What ordinary instructions wrote to shared memory is seen by the matrix products that follow.
DEVICE void publish_operand() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Tells the compiler that these registers change here: it may not move their uses over a fence or a wait.
template <int N>
DEVICE void pin(float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

// Operands with the 128-byte swizzle: blocks of [rows][64 float16], 1024-byte aligned; 16-byte chunk c of row r is stored
// as chunk c ^ (r % 8) of the row.
#define BLOCK_ROW 128  // bytes

DEVICE u32 swizzled(int row, int chunk) { return row * BLOCK_ROW + ((chunk ^ (row & 7)) << 4); }

// Descriptor of such an operand from a shared address; `stride` bytes from one block to the next, which only an operand
// whose rows run along the sum (the transposed one) needs. Eight rows are 1024 bytes.
DEVICE u64 matrix_at(u32 address, u32 stride) {
    return (u64)(address >> 4) | (u64)(stride >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define NAMES4 "%0,%1,%2,%3"
#define NAMES8 NAMES4 ",%4,%5,%6,%7"
#define NAMES16 NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES32 NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES48 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES64                                                                                                      \
    NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
            "%58,%59,%60,%61,%62,%63"
#define NAMES96                                                                                                      \
    NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
            "%92,%93,%94,%95"
#define NAMES128                                                                                                     \
    NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
            "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
            "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SUMS4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define SUMS8(d) SUMS4(d), SUMS4((d) + 4)
#define SUMS16(d) SUMS8(d), SUMS8((d) + 8)
#define SUMS32(d) SUMS16(d), SUMS16((d) + 16)
#define SUMS48(d) SUMS32(d), SUMS16((d) + 32)
#define SUMS64(d) SUMS32(d), SUMS32((d) + 32)
#define SUMS96(d) SUMS64(d), SUMS32((d) + 64)
#define SUMS128(d) SUMS64(d), SUMS64((d) + 64)

// d (64 x N) = a b^T, or += where `add`: a 64 rows, b N rows of 16 elements, both in shared memory.
#define PRODUCT_OF_SHARED(N, REGISTERS, A, B, ADD)                                                               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD                                                            \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES##REGISTERS "}, " A ", " B \
                 ", p, 1, 1, 0, 0;}"                                                                             \
                 : SUMS##REGISTERS(d)                                                                            \
                 : "l"(a), "l"(b), "r"((int)add))

template <int N>
DEVICE void product_of_shared(float* d, u64 a, u64 b, bool add) {
    static_assert(N == 64 || N == 128, "a width that is written out below");
    if constexpr (N == 64) PRODUCT_OF_SHARED(64, 32, "%32", "%33", "%34");
    if constexpr (N == 128) PRODUCT_OF_SHARED(128, 64, "%64", "%65", "%66");
}

// d (64 x N) = a b, or += where `add`: a 64 x 16 in registers (laid out as mma16's), b in shared memory: N rows of 16
// elements or, TRANSPOSED, 16 rows of N.
#define PRODUCT_OF_REGISTERS(N, REGISTERS, A0, A1, A2, A3, B, ADD, T)                                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD                                                             \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES##REGISTERS "}, {" A0 "," A1 \
                 "," A2 "," A3 "}, " B ", p, 1, 1, " T ";}"                                                       \
                 : SUMS##REGISTERS(d)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED))

template <int N, int TRANSPOSED>
DEVICE void product_of_registers(float* d, const u32* a, u64 b, int add) {
    static_assert((N >= 8 && N <= 256 && (N & (N - 1)) == 0) || N == 96 || N == 192, "a width that is written out below");
    if constexpr (N == 8) PRODUCT_OF_REGISTERS(8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10");
    if constexpr (N == 16) PRODUCT_OF_REGISTERS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14");
    if constexpr (N == 32) PRODUCT_OF_REGISTERS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
    if constexpr (N == 64) PRODUCT_OF_REGISTERS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    if constexpr (N == 96) PRODUCT_OF_REGISTERS(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54");
    if constexpr (N == 128) PRODUCT_OF_REGISTERS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    if constexpr (N == 192) PRODUCT_OF_REGISTERS(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102");
    if constexpr (N == 256) PRODUCT_OF_REGISTERS(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134");
}
