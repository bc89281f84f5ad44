// The inner part of decode attention in float32 for any head width and cache type; joined behind attention_decode.cuh.
//
// A warp takes tiles of 32 positions: one lane per position for the scores (no shuffles), one lane per element for the
// values. This is the path of the float32 cache and the twin the tensor-core path is compared with.

#define TILE 32
#define VALUES_PER_LANE ((VALUE_DIM + WARP - 1) / WARP)
#define KEY_STEP (KEY_DIM % 4 == 0 ? 4 : 1)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_decode(DECODE_PARAMETERS) {
    extern __shared__ __align__(16) float merge[];
    __shared__ __align__(16) Shared sh;
    __shared__ float weights[DECODE_WARPS][HEAD_TILE][TILE];
    const Cuts cuts = {window, max_pages * PAGE};
    Task task;
    bool busy;
    int left = ONE_RANGE ? take_one(task, positions, cuts) : take_share(task, busy, positions, rows, cuts, slots);
    if (left == 0) {
        if (blockIdx.y == 0) pdl_wait();  // one block that waits keeps the grid behind its predecessors
        return;
    }
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, kv_head = kv_head_of_block();
    int peek = positions[min(task.row + 1, rows - 1)];
    sums_t sums[MERGE_PASSES][OWN] = {};
    float factor = 0.0f;
    bool first_row = true, new_row = true;
    Share share;
    while (true) {
        const int* pages = block_table + (i64)task.row * max_pages;
        if (new_row) {
            share = share_of_row(task, left);
            __syncthreads();  // the row before is done
            rope_angles(sh.angles, task.position, inv_freq, rope_scale);
            if (first_row) bring_norms(sh, q_norm, k_norm);
            __syncthreads();
            if (first_row) pdl_wait();
            first_row = false;
            const int page = page_of_token(task, block_table, max_pages);
            take_token(sh, task, share.owns_new, page, qkv, cache_k, cache_v, q_norm, k_norm, eps, [] {});
            if (share.n_ranges == left) pdl_launch();  // not before: the next weights would queue before this input
            __syncthreads();
            const float row_scale = scale * query_factor({temperature, temperature_length, temperature_offset}, task.position);
            if (share.owns_new) {
                score_new_token(sh, task, row_scale, softcap);
                mark_spoilt(sh, task, page, cache_k);
            }
            factor = score_factor(row_scale, softcap);
        }
        float o[HEAD_TILE][VALUES_PER_LANE] = {};
        float top[HEAD_TILE], sum[HEAD_TILE];
#pragma unroll
        for (int h = 0; h < HEAD_TILE; ++h) top[h] = LOWEST, sum[h] = 0.0f;

        for (int start = task.low + warp * TILE; start < task.high; start += DECODE_WARPS * TILE) {
            const int page = pages[start / PAGE];  // a tile is part of one page
            if (page < 0) continue;
            const int n = min(TILE, task.high - start);
            const bool seen = lane < n && start + lane >= task.first;
            const CachedRow<KEY_DIM> key(cache_k, page, kv_head, start + min(lane, n - 1));
            float s[HEAD_TILE] = {};
#pragma unroll 4
            for (int d = 0; d < KEY_DIM; d += KEY_STEP) {
                float k[KEY_STEP];
                key.load(k, d);
#pragma unroll
                for (int h = 0; h < HEAD_TILE; ++h)
#pragma unroll
                    for (int e = 0; e < KEY_STEP; ++e) s[h] = fmaf(sh.query[h][d + e], k[e], s[h]);
            }
#pragma unroll
            for (int h = 0; h < HEAD_TILE; ++h) {
                float score = seen ? score_base2(__fmul_rn(s[h], factor), softcap) : minus_infinity();
#ifdef ALIBI
                if (h < heads_of_block(task))
                    score = with_bias(score, slopes, head0_of_block(task) + h, task.position - start - lane);
#endif
                const float risen = fmaxf(top[h], warp_max(score)), shrink = power2(top[h] - risen),
                            p = power2(score - risen);
                top[h] = risen;
                sum[h] = fmaf(sum[h], shrink, p);
                weights[warp][h][lane] = p;
#pragma unroll
                for (int i = 0; i < VALUES_PER_LANE; ++i) o[h][i] = __fmul_rn(o[h][i], shrink);
            }
            __syncwarp();
#pragma unroll 4
            for (int r = 0; r < n; ++r) {
                const CachedRow<VALUE_STRIDE> value(cache_v, page, kv_head, start + r);
                float v[VALUES_PER_LANE];
#pragma unroll
                for (int i = 0; i < VALUES_PER_LANE; ++i) {
                    const int d = lane + i * WARP;
                    v[i] = VALUE_DIM % WARP == 0 || d < VALUE_DIM ? value[d] : 0.0f;
                }
#pragma unroll
                for (int h = 0; h < HEAD_TILE; ++h)
#pragma unroll
                    for (int i = 0; i < VALUES_PER_LANE; ++i) o[h][i] = fmaf(weights[warp][h][r], v[i], o[h][i]);
            }
            __syncwarp();
        }

#pragma unroll
        for (int h = 0; h < HEAD_TILE; ++h) {
            const float total = warp_sum(sum[h]);
            if (lane == 0) sh.top[warp][h] = top[h], sh.sum[warp][h] = total;
        }
        __syncthreads();
        const int own = lane / 4;
        const float f = weigh_warps(sh, task, sinks, own < heads_of_block(task) ? sh.top[warp][own] : 0.0f);
        auto store = [&](int head0, const Merge& to) {
#pragma unroll
            for (int h = 0; h < HEAD_TILE; ++h) {
                if (h < head0 || h >= head0 + MERGE_HEADS) continue;
                const float factor_h = __shfl_sync(FULL_MASK, f, 4 * h);
#pragma unroll
                for (int i = 0; i < VALUES_PER_LANE; ++i) {
                    const int d = lane + i * WARP;
                    if (d < VALUE_DIM) to.sums[warp * to.pitch + (h - head0) * MERGE_STRIDE + d] = o[h][i] * factor_h;
                }
            }
        };
        finish_range(sh, task, share.whole, sums, Merge{merge, MERGE_HEADS, MERGE_HEADS * MERGE_STRIDE}, slots, partial,
                     partial_max_sum, out, operand, operand_groups, store);
        const bool row_ends = left == 1 || task.split + 1 == task.n_used;
        if (!share.whole && row_ends)
            finish_row(sh, task, share.n_ranges, merge, sinks, slots, partial, partial_max_sum, counters, out, operand,
                       operand_groups);
        if (ONE_RANGE || --left == 0) break;
        new_row = row_ends;
        advance(task, peek, positions, rows, cuts);
    }
}
