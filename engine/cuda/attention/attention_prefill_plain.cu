// Prefill attention in float32 for any head width and cache type: online softmax, no score matrix in memory.
//
// grid (tiles, HEADS), 8 warps of 4 rows. Keys and queries pass through shared memory in slices of SLICE elements, one
// lane per cache position for the scores, one lane per element for the values. Arguments as in
// attention_prefill_half.cu. Needs attention_common.cuh, cached_rows.cuh.

#define SLICE 64
#define COLUMNS 32
#define ROWS_PER_WARP 4
#define TILE_ROWS_PLAIN 32
#define VALUES_PER_LANE ((VALUE_DIM + WARP - 1) / WARP)

extern "C" __global__ void __launch_bounds__(256)
    attention_prefill(PREFILL_PARAMETERS) {
    __shared__ float keys[COLUMNS][SLICE + 1];  // the pad keeps 32 lanes with 32 positions in 32 banks
    __shared__ __align__(16) float queries[TILE_ROWS_PLAIN][SLICE];
    pdl_launch();
    pdl_wait();
    const int4 tile = tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / GROUP;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int* pages = block_table + (i64)tile.z * max_pages;
    const int length = LENGTH_OF(tile.z), end = last_seen(tile.w + tile.y - 1, window, length) + 1;
    const int first = first_seen(tile.w, window) / COLUMNS * COLUMNS;
    const float factor = score_factor(scale, softcap);
    const int at = tile.w + warp * ROWS_PER_WARP;  // position of this warp's first row
    float o[ROWS_PER_WARP][VALUES_PER_LANE] = {};
    float top[ROWS_PER_WARP], sum[ROWS_PER_WARP];
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; ++r) top[r] = LOWEST, sum[r] = 0.0f;

    for (int start = first; start < end; start += COLUMNS) {
        const int page = pages[start / PAGE], n = page < 0 ? 0 : min(COLUMNS, end - start);
        float s[ROWS_PER_WARP] = {};
        for (int slice = 0; slice < KEY_DIM; slice += SLICE) {
            __syncthreads();
            for (int i = threadIdx.x; i < COLUMNS * SLICE; i += 256) {
                const int p = i / SLICE, d = slice + i % SLICE;
                keys[p][i % SLICE] = p < n && d < KEY_DIM ? CachedRow<KEY_DIM>(cache_k, page, kv_head, start + p)[d] : 0.0f;
                queries[p][i % SLICE] =
                    p < tile.y && d < KEY_DIM ? qkv[(i64)(tile.x + p) * ROW_WIDTH + head * KEY_DIM + d] : 0.0f;
            }
            __syncthreads();
#pragma unroll 4
            for (int d = 0; d < SLICE; d += 4) {
                float k[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) k[e] = keys[lane][d + e];
#pragma unroll
                for (int r = 0; r < ROWS_PER_WARP; ++r) {
                    const float4 q = *(const float4*)&queries[warp * ROWS_PER_WARP + r][d];
                    s[r] += q.x * k[0] + q.y * k[1] + q.z * k[2] + q.w * k[3];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS_PER_WARP; ++r) {
            const int column = start + lane;
            const bool seen = lane < n && column <= last_seen(at + r, window, length) && column >= first_seen(at + r, window);
            float score = seen ? score_base2(s[r] * factor, softcap) : minus_infinity();
#if defined(ALIBI) || defined(DISTANCES)
            score = with_bias(score, slopes, head, at + r - column);
#endif
            const float risen = fmaxf(top[r], warp_max(score)), shrink = power2(top[r] - risen);
            s[r] = power2(score - risen);
            top[r] = risen;
            sum[r] = sum[r] * shrink + s[r];
#pragma unroll
            for (int i = 0; i < VALUES_PER_LANE; ++i) o[r][i] *= shrink;
        }
#pragma unroll 4
        for (int p = 0; p < n; ++p) {
            const CachedRow<VALUE_STRIDE> value(cache_v, page, kv_head, start + p);
#pragma unroll
            for (int i = 0; i < VALUES_PER_LANE; ++i) {
                const int d = lane + i * WARP;
                const float v = VALUE_DIM % WARP == 0 || d < VALUE_DIM ? value[d] : 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS_PER_WARP; ++r) o[r][i] += __shfl_sync(FULL_MASK, s[r], p) * v;
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; ++r) {
        const float total = warp_sum(sum[r]);
        const int row = warp * ROWS_PER_WARP + r;
        if (row >= tile.y) continue;
        const float f = final_factor(top[r], total, sinks, head);
        float* to = out + ((i64)(tile.x + row) * HEADS + head) * VALUE_DIM;
#pragma unroll
        for (int i = 0; i < VALUES_PER_LANE; ++i)
            if (VALUE_DIM % WARP == 0 || lane + i * WARP < VALUE_DIM) to[lane + i * WARP] = o[r][i] * f;
    }
}
