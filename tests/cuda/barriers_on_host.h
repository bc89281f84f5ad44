// Barriers in shared memory and bulk copies (hopper.cuh) for kernels that run on the CPU, on top of blocks_on_host.h.
//
// A copy is done at once, and a thread that waits lets the others run. A barrier is 8 bytes, as on the card.
#include "blocks_on_host.h"

struct Barrier {
    short arrivals, pending;
    int phase_and_bytes;  // bytes that are to come, times 2, and the phase's parity
};
static Barrier* barrier_at(u32 address) { return (Barrier*)(&shared_begin + (int)address); }
static void end_phase(Barrier* barrier) {
    if (barrier->pending || barrier->phase_and_bytes >> 1) return;
    barrier->phase_and_bytes ^= 1;
    barrier->pending = barrier->arrivals;
}

static void barrier_init(u32 barrier, u32 arrivals) { *barrier_at(barrier) = {(short)arrivals, (short)arrivals, 0}; }
static void publish_barriers() {}
static void barrier_expect(u32 barrier, u32 bytes) {
    assert(barrier_at(barrier)->pending > 0);
    barrier_at(barrier)->phase_and_bytes += 2 * bytes;
    --barrier_at(barrier)->pending;
    end_phase(barrier_at(barrier));
}
static void barrier_wait(u32 barrier, u32 parity) {
    for (int turns = 0; (u32)(barrier_at(barrier)->phase_and_bytes & 1) == parity; ++turns) {
        if (turns > 100000) fprintf(stderr, "thread %d waits for a barrier that stays\n", threadIdx.x), abort();
        wait_for(Wait::FOR_WARP, 1u << threadIdx.x % WARP);
    }
}
template <bool ONCE>
static void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    u8* const target = (u8*)(&shared_begin + (int)to);
    assert(((size_t)target | (size_t)from | bytes) % 16 == 0);
    memcpy(target, from, bytes);
    barrier_at(barrier)->phase_and_bytes -= 2 * (int)bytes;
    end_phase(barrier_at(barrier));
}

static u32 hidden_constant(u32 v) { return v; }
static void __threadfence_block() {}
static u32 __reduce_add_sync(u32 mask, u32 v) {
    for (int offset = WARP / 2; offset; offset >>= 1) v += __shfl_xor_sync(mask, v, offset);
    return v;
}
static u32 __reduce_max_sync(u32 mask, u32 v) {
    for (int offset = WARP / 2; offset; offset >>= 1) {
        const u32 other = __shfl_xor_sync(mask, v, offset);
        v = v > other ? v : other;
    }
    return v;
}
static void named_barrier(int, int) { abort(); }  // parts of a block: no test needs them
static void atomicMax(u32* to, u32 v) { *to = *to > v ? *to : v; }
