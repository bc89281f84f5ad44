// The inner part of decode attention on tensor cores; joined behind attention_decode.cuh and the file that knows how the
// cache's numbers become operands, decode_tiles_half.cuh or decode_tiles_q8.cuh.
//
// A warp takes tiles of TILE positions. S^T = Q K^T with the 8 heads' float16 roundings as rows 0-7 of the 16-row operand
// and what rounding lost as rows 8-15, so both sum up to float32 exactness in one instruction; O^T = V^T P^T with the
// weights as hi + lo in two. Which element of a head is which k index (or which row) does not matter as long as both
// operands agree, so every lane reads 16 contiguous bytes of a row at a time. Copies are contiguous in memory; the
// strides in shared memory put the 8 lanes of one 16-byte read phase into different banks.

struct Tiles {           // one warp's share of a range: tiles warp, warp + DECODE_WARPS, ...
    int count, pages32;  // pages32: lane i holds the page of this warp's tile (32 * n + i)
};

DEVICE int tile_start(const Task& task, int j) {
    return task.low + ((int)(threadIdx.x >> 5) + j * DECODE_WARPS) * TILE;
}

DEVICE void look_up_pages(Tiles& tiles, const Task& task, int j, const int* block_table, int max_pages) {
    const int p = tile_start(task, j + (threadIdx.x & 31));
    tiles.pages32 = p < task.high ? block_table[(i64)task.row * max_pages + p / PAGE] : -1;
}

DEVICE int count_tiles(const Task& task) {
    const int n_tiles = (task.high - task.low + TILE - 1) / TILE;
    return max(0, (n_tiles - (int)(threadIdx.x >> 5) + DECODE_WARPS - 1) / DECODE_WARPS);
}

DEVICE Tiles tiles_of(const Task& task, const int* block_table, int max_pages) {
    Tiles tiles;
    tiles.count = count_tiles(task);
    look_up_pages(tiles, task, 0, block_table, max_pages);
    return tiles;
}

// What a warp fetches next: a tile of the range at hand, else its first tile of the block's next range.
struct Fetch {
    int start, high, page;  // page -2: nothing
};

DEVICE Fetch fetch_of(const Tiles& tiles, const Task& task, int j) {
    return {tile_start(task, j), task.high, __shfl_sync(FULL_MASK, tiles.pages32, j & 31)};
}

DEVICE void copy_keys(u8* slot, const Fetch& fetch, const cache_t* cache_k) {
    if (fetch.page > -2) copy_rows<KEY_DIM, KEY_STRIDE>(slot, cache_k, fetch.start, fetch.high, fetch.page);
    copy_commit();
}

DEVICE void copy_values(u8* slot, const Fetch& fetch, const cache_t* cache_v) {
    if (fetch.page > -2)
        copy_rows<VALUE_DIM, VALUE_STRIDE>(slot + VALUES_IN_SLOT, cache_v, fetch.start, fetch.high, fetch.page);
    copy_commit();
}

DEVICE Fetch first_of(const Tiles& tiles, const Task& task) {
    return tiles.count > 0 ? fetch_of(tiles, task, 0) : Fetch{0, 0, -2};
}

// Puts one head's scaled query where the lanes of every warp read it as matrix operand: fragments[i][lane] holds
// hi and lo of two pairs of elements. One warp, after norm_and_rotate.
DEVICE void store_fragments(uint4 (*fragments)[WARP], float* offsets, const float* query, int head, float factor) {
    for (int first = 0; first < KEY_DIM / 2; first += WARP) {
        const int pair = first + (threadIdx.x & 31), d = 2 * pair, in_tail = d - 32 * KEY_CHUNKS;
        u32 hi = 0, lo = 0;
        if (pair < KEY_DIM / 2) {
            const int i = in_tail < 0 ? 2 * (d / 32) + d % 8 / 4 : 2 * KEY_CHUNKS,
                      t = in_tail < 0 ? d % 32 / 8 : in_tail / 4;
            u32* words = (u32*)&fragments[i][head * 4 + t] + d % 4;
            split_halves(query[d] * factor, query[d + 1] * factor, hi, lo);
            words[0] = hi, words[1] = lo;
        }
        note_offset(offsets, head, pair, hi, lo);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_decode(DECODE_PARAMETERS) {
    extern __shared__ __align__(16) u8 dynamic[];  // a tile for each warp, then merge
    __shared__ __align__(16) Shared sh;
    __shared__ uint4 fragments[KEY_DIM / 16][WARP];
    __shared__ float offsets[CACHE_Q8 ? KEY_CHUNKS * 8 : 1];
    const Cuts cuts = {window, max_pages * PAGE};
    Task begin;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if ONE_RANGE
    const int left = take_one(begin, positions, cuts) && heads_of_block(begin) > 0;
#else
    // The range at hand, the next one, and the one after that, which the last warp finds. Range i is in i % 4: a warp may
    // still be at range i - 1 when the last one has found range i + 2.
    __shared__ Task tasks[4];
    // Where every row is one range, this block's first row is known before any length: its pages are asked for meanwhile.
    const int guess = rows / gridDim.y * blockIdx.y + min(blockIdx.y, rows % gridDim.y);
    const int guess_page = (warp + lane * DECODE_WARPS) * TILE / PAGE;
    const int guessed = guess < rows && guess_page < max_pages ? block_table[(i64)guess * max_pages + guess_page] : -1;
    bool busy;
    int left = take_share(begin, busy, positions, rows, cuts, slots);
#endif
    if (left == 0) {
        if (blockIdx.y == 0) pdl_wait();  // one block that waits keeps the grid behind its predecessors
        return;
    }
    u8* slot = dynamic + warp * TILE_BYTES;
    float* merge = (float*)(dynamic + DECODE_WARPS * TILE_BYTES);
#if ONE_RANGE
    Tiles tiles = tiles_of(begin, block_table, max_pages);
    const bool late = false;
#else
    Tiles tiles = {count_tiles(begin), tile_start(begin, lane) < begin.high ? guessed : -1};
    if (begin.row != guess || begin.low != 0) look_up_pages(tiles, begin, 0, block_table, max_pages);
    // Behind what two blocks of a multiprocessor ask for the query would wait longer than it takes to prepare it.
    const bool late = busy;  // values behind the query
#endif
    const Fetch fetch_first = first_of(tiles, begin);
    // Old rows: no earlier kernel of this step writes them.
    copy_keys(slot, fetch_first, cache_k);
    if (!ONE_RANGE) copy_commit();  // where later ranges have a token
    if (!late) copy_values(slot, fetch_first, cache_v);
#if !ONE_RANGE
    int peek = 0;
    if (warp == DECODE_WARPS - 1) {
        peek = positions[min(begin.row + 1, rows - 1)];
        Task ahead = begin;
        if (left > 1) advance(ahead, peek, positions, rows, cuts);
        if (lane == 0) tasks[0] = begin, tasks[1] = ahead;
    }
#endif
    sums_t sums[MERGE_PASSES][OWN] = {};
    bool first_row = true, new_row = true;
    Share share;
    int page = page_of_token(begin, block_table, max_pages), page_ahead = -1;
    bring_norms(sh, q_norm, k_norm);
    rope_angles(sh.angles, begin.position, inv_freq, rope_scale);
    for (int i = threadIdx.x; i < KEY_DIM / 16 * WARP; i += THREADS) fragments[0][i] = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; CACHE_Q8 && i < KEY_CHUNKS * 8; i += THREADS) offsets[i] = 0.0f;
    __syncthreads();
    pdl_wait();
#if ONE_RANGE
    uint4 q[KEY_DIM / 16];
#define QUERY(i) q[i]
#else
#define QUERY(i) fragments[i][lane]
#endif
    for (int turn = 0;; turn = turn + 1 & 3) {
        Tiles tiles_ahead = {0, -1};
        bool row_ends = true;
#if ONE_RANGE
        const Task &task = begin, &next = begin;
#else
        const Task &task = tasks[turn], &next = tasks[turn + 1 & 3];
        if (left > 1) {
            tiles_ahead = tiles_of(next, block_table, max_pages);
            row_ends = next.row != task.row;
        }
#endif
        if (new_row) {
            share = share_of_row(task, left);
            if (!first_row) {
                copy_wait<1>();   // sh.raw
                __syncthreads();  // and the row before is done
            }
            take_token(sh, task, share.owns_new, page, first_row ? qkv : 0, cache_k, cache_v, q_norm, k_norm, eps,
                       [&] { if (late && first_row) copy_values(slot, fetch_first, cache_v); });
            if (share.n_ranges == left) pdl_launch();  // not before: the next weights would queue before this input
            first_row = false;
            const float row_scale = scale * query_factor({temperature, temperature_length, temperature_offset}, task.position);
            for (int h = warp; h < heads_of_block(task); h += DECODE_WARPS)
                store_fragments(fragments, offsets, sh.query[h], h, score_factor(row_scale, softcap));
            __syncthreads();
            if (share.owns_new) {
                if (ONE_RANGE) score_new_token(sh, task, row_scale, softcap);
                mark_spoilt(sh, task, page, cache_k);
            }
#if ONE_RANGE
#pragma unroll
            for (int i = 0; i < KEY_DIM / 16; ++i) q[i] = fragments[i][lane];
#endif
        }

        float o[VALUE_DIM / 16][4] = {};
        float top = LOWEST, sum = 0.0f;  // of head g; sum over this lane's positions only
        auto leave_top = [&] {  // for the other warps
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            if (t == 0) sh.top[warp][g] = top, sh.sum[warp][g] = sum;
            __syncthreads();
        };
        const int first = task.first, high_end = task.high;
        for (int j = 0; j < (ONE_RANGE ? tiles.count : max(tiles.count, 1)); ++j) {
            const int start = tile_start(task, j);
            const bool last = j + 1 >= tiles.count;
            float s[TILE / 4] = {};  // of positions 8n + 2t and the next one, for each n
            if (ONE_RANGE || tiles.count > 0) {
                if (!ONE_RANGE && j == 0)
                    copy_wait<2>();  // a token, and values
                else
                    copy_wait<1>();
                __syncwarp();
                score_tile(s, slot, [&](int i) { return QUERY(i); }, offsets);
                __syncwarp();
            }
            if (!last && (j + 1 & 31) == 0) look_up_pages(tiles, task, j + 1, block_table, max_pages);
            const Fetch fetch = last ? first_of(tiles_ahead, next) : fetch_of(tiles, task, j + 1);
            copy_keys(slot, fetch, cache_k);

            float p[TILE / 4], high = LOWEST;
#pragma unroll
            for (int i = 0; i < TILE / 4; ++i) {
                const int at = start + 8 * (i >> 1) + 2 * t + (i & 1);
                const float score = score_base2(s[i], softcap);
                p[i] = at >= first && at < high_end ? score : minus_infinity();
                high = fmaxf(high, p[i] - 8.0f);  // weights up to 2^8 keep the lo halves out of the subnormals
            }
            high = fmaxf(high, __shfl_xor_sync(FULL_MASK, high, 1));
            high = fmaxf(high, __shfl_xor_sync(FULL_MASK, high, 2));
            if (__any_sync(FULL_MASK, high > top)) {
                const float risen = fmaxf(top, high), shrink = power2(top - risen);
                top = risen;
                sum = __fmul_rn(sum, shrink);
                if (j > 0) {  // else all are zeros
                    const float left_shrink = __shfl_sync(FULL_MASK, shrink, 8 * t),
                                right_shrink = __shfl_sync(FULL_MASK, shrink, 8 * t + 4);
#pragma unroll
                    for (int i = 0; i < VALUE_DIM / 16; ++i)
                        o[i][0] *= left_shrink, o[i][1] *= right_shrink, o[i][2] *= left_shrink, o[i][3] *= right_shrink;
                }
            }
#pragma unroll
            for (int i = 0; i < TILE / 4; ++i) p[i] = power2(p[i] - top);
            u32 hi[TILE / 16][2], lo[TILE / 16][2];
#pragma unroll
            for (int i = 0; i < TILE / 16; ++i) {
                sum += (p[4 * i] + p[4 * i + 1]) + (p[4 * i + 2] + p[4 * i + 3]);
                split_halves(p[4 * i], p[4 * i + 1], hi[i][0], lo[i][0]);
                split_halves(p[4 * i + 2], p[4 * i + 3], hi[i][1], lo[i][1]);
            }

#if !ONE_RANGE
            if (last) {
                if (task.split == task.n_used - 1) {
                    const float row_scale = scale * query_factor({temperature, temperature_length, temperature_offset}, task.position);
                    score_new_token(sh, task, row_scale, softcap);
                }
                if (warp == DECODE_WARPS - 1 && left > 2) {
                    Task after = next;
                    advance(after, peek, positions, rows, cuts);
                    if (lane == 0) tasks[turn + 2 & 3] = after;
                }
                leave_top();  // factors are known before the last values have come
                const float f = weigh_warps(sh, task, sinks, top);
                if (t == 0) sh.factor[warp][g] = f;
                if (row_ends && left > 1) {
                    fetch_token(sh, qkv, next);
                    page_ahead = page_of_token(next, block_table, max_pages);
                    rope_angles(sh.angles, next.position, inv_freq, rope_scale);
                }
                copy_commit();  // a group of its own, between the next range's first keys and values
            }
#endif
            if (ONE_RANGE || tiles.count > 0) {
                if (!ONE_RANGE && last)
                    copy_wait<2>();  // keys, and a token
                else
                    copy_wait<1>();
                __syncwarp();
#pragma unroll
                for (int i = 0; i < TILE / 16; ++i) add_positions(o, slot, i, hi[i], lo[i]);
                __syncwarp();
            }
            copy_values(slot, fetch, cache_v);
        }

#if ONE_RANGE
        leave_top();
        const float f = weigh_warps(sh, task, sinks, top);
        const float left_f = __shfl_sync(FULL_MASK, f, 8 * t), right_f = __shfl_sync(FULL_MASK, f, 8 * t + 4);
#else
        __syncwarp();
        const float left_f = sh.factor[warp][2 * t], right_f = sh.factor[warp][2 * t + 1];
#endif
        // Behind the block's last range nothing is fetched any more: tiles have room for the sums of all heads.
        constexpr bool ALL_FIT = MERGE_PASSES > 1 && (MOST_HEADS + 1) * MERGE_STRIDE * 4 <= TILE_BYTES;
        const Merge exchange = ALL_FIT && left == 1 ? Merge{(float*)dynamic, MOST_HEADS, TILE_BYTES / 4}
                                                    : Merge{merge, MERGE_HEADS, MERGE_HEADS * MERGE_STRIDE};
        auto store = [&](int head0, const Merge& to) {
            const int h = 2 * t - head0;  // this lane's first head
            if (h < 0 || h >= to.heads) return;
            float* mine = to.sums + warp * to.pitch + h * MERGE_STRIDE;
#pragma unroll
            for (int i = 0; i < VALUE_DIM / 16; ++i) {
                const int d = value_of(i, g);
                *(float2*)(mine + d) = make_float2(o[i][0] * left_f, o[i][2] * left_f);
                *(float2*)(mine + MERGE_STRIDE + d) = make_float2(o[i][1] * right_f, o[i][3] * right_f);
            }
        };
        finish_range(sh, task, share.whole, sums, exchange, slots, partial, partial_max_sum, out, operand,
                     operand_groups, store);
        if (!share.whole && row_ends)
            finish_row(sh, task, share.n_ranges, merge, sinks, slots, partial, partial_max_sum, counters, out, operand,
                       operand_groups);
#if ONE_RANGE
        break;
#else
        if (--left == 0) break;
        new_row = row_ends;
        tiles = tiles_ahead;
        page = page_ahead;
#endif
    }
    copy_wait<0>();
}
