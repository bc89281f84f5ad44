// Attention over chosen positions in float32 for any head width and cache type; see attention_chosen.cuh, which is needed.
//
// A warp takes tiles of 32 positions: one lane per position for the scores, lanes along the values. This is the path of the
// float32 cache, and the twin that the one with tensor cores is compared with.

#define KEY_STEP (KEY_DIM % 4 == 0 ? 4 : 1)
#define VALUE_STEP (KEY_DIM % 4 == 0 && VALUE_DIM % 4 == 0 ? 4 : 1)
#define CHUNKS ((VALUE_DIM + WARP * VALUE_STEP - 1) / (WARP * VALUE_STEP))
#define OWN ((VALUE_DIM + THREADS - 1) / THREADS)  // numbers of a head's sum that one thread keeps

extern "C" __global__ void __launch_bounds__(256)
    attention_chosen(const float* qkv, const cache_t* cache_k, const cache_t* cache_v, const int* block_table,
                     int max_pages, const int* row_sequence, const int* positions, const int* chosen, int count,
                     float scale, float softcap, const float* sinks, int range, int dealt, int n_ranges, float* partial,
                     float2* partial_max_sum, float* out) {
    __shared__ __align__(16) float query[HEAD_TILE][KEY_DIM];
    __shared__ float weights[WARPS][HEAD_TILE][TILE];
    __shared__ float merge[WARPS][VALUE_DIM];
    __shared__ Sum sums[WARPS][HEAD_TILE];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, position = positions[row], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0) return;
    const int column = blockIdx.y % (KV_HEADS * HEAD_TILES), kv_head = column / HEAD_TILES;
    const int head0 = kv_head * GROUP + column % HEAD_TILES * HEAD_TILE;
    const int n_heads = min(HEAD_TILE, GROUP - column % HEAD_TILES * HEAD_TILE);
    const int* pages = block_table + (i64)row_sequence[row] * max_pages;
    const int* list = chosen + ((i64)row * CHOICES + (CHOICES == 1 ? 0 : kv_head)) * count;
    const float factor = score_factor(scale, softcap);
    for (int i = threadIdx.x; i < HEAD_TILE * KEY_DIM; i += THREADS)
        query[i / KEY_DIM][i % KEY_DIM] =
            i / KEY_DIM < n_heads ? qkv[(i64)row * ROW_WIDTH + head0 * KEY_DIM + i] : 0.0f;
    __syncthreads();

    Sum all[HEAD_TILE];
    float totals[HEAD_TILE][OWN] = {};
#pragma unroll
    for (int h = 0; h < HEAD_TILE; ++h) all[h].top = LOWEST, all[h].weight = 0.0f;
    const int first = blockIdx.y / (KV_HEADS * HEAD_TILES), end = dealt ? first + 1 : n_ranges;
#pragma unroll 1
    for (int split = first; split < end; ++split) {
        const int high = min((split + 1) * range, PLACES(count));
        float o[HEAD_TILE][CHUNKS][VALUE_STEP] = {};
        float top[HEAD_TILE], sum[HEAD_TILE];
#pragma unroll
        for (int h = 0; h < HEAD_TILE; ++h) top[h] = LOWEST, sum[h] = 0.0f;
        for (int start = split * range + warp * TILE; start < high; start += WARPS * TILE) {
            const int found = chosen_row(list, start + lane, high, position, pages, kv_head), at = max(found, 0);
            const bool seen = found >= 0;
            const cache_t* key = cache_k + (i64)at * KEY_DIM;
            float s[HEAD_TILE] = {};
#pragma unroll 4
            for (int d = 0; d < KEY_DIM; d += KEY_STEP) {
                float k[KEY_STEP];
                load_cached(k, key + d);
#pragma unroll
                for (int h = 0; h < HEAD_TILE; ++h)
#pragma unroll
                    for (int e = 0; e < KEY_STEP; ++e) s[h] = fmaf(query[h][d + e], k[e], s[h]);
            }
#pragma unroll
            for (int h = 0; h < HEAD_TILE; ++h) {
                const float score = seen ? score_base2(__fmul_rn(s[h], factor), softcap) : minus_infinity();
                const float risen = fmaxf(top[h], warp_max(score)), shrink = power2(top[h] - risen),
                            weight = power2(score - risen);
                top[h] = risen;
                sum[h] = fmaf(sum[h], shrink, weight);
                weights[warp][h][lane] = weight;
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
                    for (int e = 0; e < VALUE_STEP; ++e) o[h][i][e] = __fmul_rn(o[h][i][e], shrink);
            }
            __syncwarp();
            const int n = min(TILE, high - start);
#pragma unroll 2
            for (int r = 0; r < n; ++r) {
                const cache_t* value = cache_v + (i64)__shfl_sync(FULL_MASK, at, r) * VALUE_STRIDE;
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i) {
                    const int d = (i * WARP + lane) * VALUE_STEP;
                    if (d >= VALUE_DIM) continue;
                    float v[VALUE_STEP];
                    load_cached(v, value + d);
#pragma unroll
                    for (int h = 0; h < HEAD_TILE; ++h)
#pragma unroll
                        for (int e = 0; e < VALUE_STEP; ++e) o[h][i][e] = fmaf(weights[warp][h][r], v[e], o[h][i][e]);
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int h = 0; h < HEAD_TILE; ++h) {
            const float total = warp_sum(sum[h]);
            if (lane == 0) sums[warp][h].top = top[h], sums[warp][h].weight = total;
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEAD_TILE; ++h) {
            Sum whole = sums[0][h];  // of the range
            for (int w = 1; w < WARPS; ++w) whole.top = fmaxf(whole.top, sums[w][h].top);
            whole.weight = 0.0f;
            for (int w = 0; w < WARPS; ++w)
                whole.weight = fmaf(sums[w][h].weight, power2(sums[w][h].top - whole.top), whole.weight);
            const float own = power2(top[h] - whole.top);
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
                for (int e = 0; e < VALUE_STEP; ++e) {
                    const int d = (i * WARP + lane) * VALUE_STEP + e;
                    if (d < VALUE_DIM) merge[warp][d] = __fmul_rn(o[h][i][e], own);
                }
            __syncthreads();
            const i64 slot = ((i64)row * HEADS + head0 + h) * n_ranges + split;
            const float2 factors = join(all[h], whole);
            if (dealt && threadIdx.x == 0 && h < n_heads) partial_max_sum[slot] = make_float2(whole.top, whole.weight);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int d = threadIdx.x + i * THREADS;
                if (d >= VALUE_DIM || h >= n_heads) continue;
                float v = 0.0f;
                for (int w = 0; w < WARPS; ++w) v += merge[w][d];
                if (!dealt) totals[h][i] = joined(totals[h][i], v, factors);
                else partial[slot * VALUE_DIM + d] = v;
            }
            __syncthreads();
        }
    }
    if (dealt) return;
#pragma unroll
    for (int h = 0; h < HEAD_TILE; ++h) {
        if (h >= n_heads) continue;
        const float f = final_factor(all[h].top, all[h].weight, sinks, head0 + h);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int d = threadIdx.x + i * THREADS;
            if (d < VALUE_DIM) out[((i64)row * HEADS + head0 + h) * VALUE_DIM + d] = totals[h][i] * f;
        }
    }
}
