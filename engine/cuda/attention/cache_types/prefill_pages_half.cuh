// How a float16 cache reaches attention_prefill_hopper.cu: copied as it is. Joined before it; needs cached_rows.cuh.

// The PAGE positions of a page from `start` on; zeros from position `end` on and where there is no page.
template <int DIM>
DEVICE void copy_page(u32 to, const cache_t* cache, int page, int kv_head, int start, int end) {
    const u16* from = cache + cache_row(max(page, 0), kv_head, start) * DIM;
    const int n_valid = page < 0 ? 0 : end - start;
#pragma unroll 4  // all at once they would need more registers than this warpgroup keeps
    for (int k = 0; k < PAGE * (DIM / 8) / 128; ++k) {
        const int i = k * 128 + threadIdx.x % 128, row = i / (DIM / 8), chunk = i % (DIM / 8);
        const u32 at = to + chunk / 8 * COLUMN_BLOCK + swizzled(row, chunk % 8);
        const int n_bytes = row < n_valid ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from + i * 8), "r"(n_bytes)
                     : "memory");
    }
}

// The warpgroup that copies. A stage is filled again when every warp of the consumers has let it go.
DEVICE void produce(u32 keys, u32 values, const Barriers& barriers, const cache_t* cache_k, const cache_t* cache_v,
                    const int* pages, int kv_head, int first, int end, int count) {
    int page[PAGES], next[PAGES];
#pragma unroll
    for (int i = 0; i < PAGES; ++i) page[i] = first + i * PAGE < end ? pages[first / PAGE + i] : -1;
    for (int n = 0; n < count; ++n) {
        const int start = first + n * TILE_COLUMNS, stage = n % STAGES;
#pragma unroll
        for (int i = 0; i < PAGES; ++i) {
            const int p = start + TILE_COLUMNS + i * PAGE;
            next[i] = p < end ? pages[p / PAGE] : -1;
        }
        barrier_wait(of_stage(barriers.keys_free, n), phase_of(n) ^ 1);
#pragma unroll
        for (int i = 0; i < PAGES; ++i)
            copy_page<KEY_DIM>(keys + stage * KEY_BYTES + i * PAGE * BLOCK_ROW, cache_k, page[i], kv_head,
                               start + i * PAGE, end);
        barrier_arrive_after_copies(of_stage(barriers.keys_full, n));
        barrier_wait(of_stage(barriers.values_free, n), phase_of(n) ^ 1);
#pragma unroll
        for (int i = 0; i < PAGES; ++i)
            copy_page<VALUE_DIM>(values + stage * VALUE_BYTES + i * PAGE * BLOCK_ROW, cache_v, page[i], kv_head,
                                 start + i * PAGE, end);
        barrier_arrive_after_copies(of_stage(barriers.values_full, n));
#pragma unroll
        for (int i = 0; i < PAGES; ++i) page[i] = next[i];
    }
    copy_wait<0>();  // nothing may be under way when the block ends
}

