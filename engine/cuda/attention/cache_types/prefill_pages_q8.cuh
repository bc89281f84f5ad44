// How a cache of 8 bits reaches attention_prefill_hopper.cu: bulk copies of RAW_ROWS positions bring it as it is, and the
// warpgroup makes float16 of it. Joined before that file; needs cached_rows.cuh, bytes_as_halves.cuh, hopper.cuh.
// Define: RAW_SLOTS, copies under way.

#define WIDER (KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM)
#define RAW_ROWS (WIDER <= 128 ? 64 : 32)
#define RAW_BYTES (RAW_ROWS * (WIDER + WIDER / BLOCK * 2))
#define RAW_PARTS (TILE_COLUMNS / RAW_ROWS)
static_assert(PAGE % RAW_ROWS == 0, "a copy is of one page");

// Bytes and scales of RAW_ROWS positions from `start` on.
template <int DIM>
DEVICE void fetch_rows(u32 to, u32 full, const cache_t* cache, int page, int kv_head, int start) {
    const CachedRow<DIM> from(cache, page, kv_head, start);
    barrier_expect(full, RAW_ROWS * (DIM + DIM / BLOCK * 2));
    bulk_copy<false>(to, from.bytes, RAW_ROWS * DIM, full);
    bulk_copy<false>(to + RAW_ROWS * DIM, from.scales, RAW_ROWS * DIM / BLOCK * 2, full);
}

template <int DIM>
DEVICE void convert_rows(u32 to, u32 from) {
    constexpr int PIECES = RAW_ROWS * (DIM / 8) / 128, AT_ONCE = PIECES % 4 == 0 ? 4 : PIECES % 3 == 0 ? 3 : PIECES % 2 == 0 ? 2 : 1;
#pragma unroll 1  // all at once they would need more registers than this warpgroup keeps
    for (int k = 0; k < PIECES; k += AT_ONCE) {
        uint2 bytes[AT_ONCE];
        u16 scale[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int i = (k + j) * 128 + threadIdx.x % 128;
            asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(bytes[j].x), "=r"(bytes[j].y) : "r"(from + i * 8) : "memory");
            asm volatile("ld.shared.b16 %0, [%1];" : "=h"(scale[j]) : "r"(from + RAW_ROWS * DIM + i * 8 / BLOCK * 2) : "memory");
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int i = (k + j) * 128 + threadIdx.x % 128, row = i / (DIM / 8), chunk = i % (DIM / 8);
            const uint4 v = numbers_of(bytes[j], scale[j]);
            asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to + chunk / 8 * COLUMN_BLOCK + swizzled(row, chunk % 8)),
                         "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                         : "memory");
        }
    }
}

// The warpgroup that copies and converts. Copies are numbered: of a step those of keys, then those of values. Positions
// behind the last one that a row sees are read as well, or those of some page where they have none: what is cached is
// finite, and they are masked. A stage is filled again when every warp of the consumers has let it go.
DEVICE void produce(u32 keys, u32 values, const Barriers& barriers, const cache_t* cache_k, const cache_t* cache_v,
                    const int* pages, int kv_head, int first, int end, int count) {
    const u32 raw = barriers.raw, full = barriers.raw_full;
    const int total = 2 * RAW_PARTS * count;
    auto start_of = [&](int n) { return first + n / (2 * RAW_PARTS) * TILE_COLUMNS + n % RAW_PARTS * RAW_ROWS; };
    auto page_of = [&](int n) {
        const int p = start_of(n);
        return n < total && p < end ? max(pages[p / PAGE], 0) : 0;
    };
    int page = threadIdx.x == 0 ? page_of(0) : 0;  // of the copy that comes next, asked for while the one before is made
    auto fetch = [&](int n) {
        if (threadIdx.x != 0 || n >= total) return;
        const u32 to = raw + n % RAW_SLOTS * RAW_BYTES, done = full + n % RAW_SLOTS * 8;
        if (n / RAW_PARTS % 2 == 0)
            fetch_rows<KEY_DIM>(to, done, cache_k, page, kv_head, start_of(n));
        else
            fetch_rows<VALUE_DIM>(to, done, cache_v, page, kv_head, start_of(n));
        page = page_of(n + 1);
    };
    for (int n = 0; n < RAW_SLOTS; ++n) fetch(n);
    int next = 0;
    auto await = [&] {
        barrier_wait(full + next % RAW_SLOTS * 8, next / RAW_SLOTS & 1);
        return raw + next % RAW_SLOTS * RAW_BYTES;
    };
    auto release = [&] {
        named_barrier(PRODUCER_BARRIER, 128);  // all have read it
        fetch(next + RAW_SLOTS);
        ++next;
    };
    for (int n = 0; n < count; ++n) {
        const int stage = n % STAGES;
        barrier_wait(of_stage(barriers.keys_free, n), phase_of(n) ^ 1);
        for (int part = 0; part < RAW_PARTS; ++part) {
            convert_rows<KEY_DIM>(keys + stage * KEY_BYTES + part * RAW_ROWS * BLOCK_ROW, await());
            release();
        }
        publish_operand();
        barrier_arrive(of_stage(barriers.keys_full, n));
        barrier_wait(of_stage(barriers.values_free, n), phase_of(n) ^ 1);
        for (int part = 0; part < RAW_PARTS; ++part) {
            convert_rows<VALUE_DIM>(values + stage * VALUE_BYTES + part * RAW_ROWS * BLOCK_ROW, await());
            release();
        }
        publish_operand();
        barrier_arrive(of_stage(barriers.values_full, n));
    }
}
