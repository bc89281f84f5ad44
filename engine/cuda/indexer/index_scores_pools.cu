// Scores of full blocks of BLOCK positions, each with one key that is pooled of those of its positions.
//
// grid (X, T), 256 threads, as in index_scores_plain.cu, whose arguments come first. cache [pages][PAGE][CACHED].
//     scores[row][b] = sum over h of weights[row][h] * factor * max(0, q_h . k_b)             float32 [T][most]
// for the blocks that end at or before the row's position; weights null: of 1, without the factor. With GATES a position's
// row of the cache is its key, then its gates: k_b is, number by number, the sum of keys weighted by the softmax over the
// block's positions of gate + ape; ape float32 [BLOCK][INDEX_WIDTH]. Else k_b is the mean, normalized by the root of the mean
// square and pool_weight float32 [INDEX_WIDTH], then rotated as at the block's first position: its numbers from ROPE_FIRST on,
// ROPE_DIM of them; inv_freq float64 [ROPE_DIM / 2]. A warp pools a block's key and multiplies it, a lane a head at a time.
// With KEPT keys of blocks are cached as they are: cache [pages][KEPT][INDEX_WIDTH], each in the page of its last position.
// Defines: CACHE_HALF, PAGE, INDEX_HEADS, INDEX_WIDTH, CACHED, BLOCK, GATES, ROPE_FIRST, ROPE_DIM, ROPE_HALVES. Needs
// cache_numbers.cuh and turned.cuh.

#define WARPS 8
#define QUERY_ROW (INDEX_WIDTH + 1)  // heads begin in different banks

struct Pool {
    const float* ape;
    const float* weight;
    const double* inv_freq;
    float eps, rope_scale;
};

// The row of the cache of a position.
DEVICE const cache_t* row_at(const cache_t* cache, const int* pages, int p) {
    return cache + ((i64)max(pages[p / PAGE], 0) * PAGE + (p & (PAGE - 1))) * CACHED;
}

// Whole warp: to = the key of block b.
#ifdef KEPT
DEVICE void pool_key(float* to, const cache_t* cache, const int* pages, int b, const Pool&) {
    const int last = (b + 1) * BLOCK - 1;
    const cache_t* const key = cache + ((i64)max(pages[last / PAGE], 0) * KEPT + last % PAGE / BLOCK) * INDEX_WIDTH;
    for (int d = threadIdx.x & 31; d < INDEX_WIDTH; d += WARP) to[d] = from_cache(key[d]);
    __syncwarp();
}
#else
DEVICE void pool_key(float* to, const cache_t* cache, const int* pages, int b, const Pool& pool) {
    const int lane = threadIdx.x & 31;
    float squares = 0.0f;
    for (int d = lane; d < INDEX_WIDTH; d += WARP) {
        float sum = 0.0f, total = GATES ? 0.0f : (float)BLOCK;
#if GATES
        float top = __uint_as_float(0xff800000u);
        for (int i = 0; i < BLOCK; ++i) {
            const float gate = from_cache(row_at(cache, pages, b * BLOCK + i)[INDEX_WIDTH + d]) + pool.ape[i * INDEX_WIDTH + d];
            top = gate > top || gate != gate ? gate : top;
        }
#endif
        for (int i = 0; i < BLOCK; ++i) {
            const cache_t* row = row_at(cache, pages, b * BLOCK + i);
            float share = 1.0f;
#if GATES
            share = expf(from_cache(row[INDEX_WIDTH + d]) + pool.ape[i * INDEX_WIDTH + d] - top);
            total += share;
#endif
            sum = fmaf(share, from_cache(row[d]), sum);
        }
        to[d] = sum /= total;
        squares = fmaf(sum, sum, squares);
    }
    __syncwarp();
#if !GATES
    const float r = 1.0f / sqrtf(warp_sum(squares) / INDEX_WIDTH + pool.eps);
    for (int d = lane; d < INDEX_WIDTH; d += WARP) to[d] = to[d] * r * pool.weight[d];
    __syncwarp();
    turn_numbers<ROPE_DIM, ROPE_HALVES>(to + ROPE_FIRST, b * BLOCK, pool.inv_freq, pool.rope_scale, lane, WARP);
    __syncwarp();
#endif
}
#endif

extern "C" __global__ void __launch_bounds__(256)
    index_scores(const float* q, int q_row, const float* weights, int weights_row, float factor, const cache_t* cache,
                 const int* block_table, int max_pages, const int* row_sequence, const int* positions, float* scores,
                 int most, const float* ape, const float* pool_weight, float eps, const double* inv_freq,
                 float rope_scale) {
    __shared__ float queries[INDEX_HEADS * QUERY_ROW];
    __shared__ float weight[INDEX_HEADS];
    __shared__ float keys[WARPS][INDEX_WIDTH];
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.y], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0) return;
    const int* pages = block_table + (i64)row_sequence[blockIdx.y] * max_pages;
    for (int i = threadIdx.x; i < INDEX_HEADS * INDEX_WIDTH; i += 256)
        queries[i / INDEX_WIDTH * QUERY_ROW + i % INDEX_WIDTH] = q[(i64)blockIdx.y * q_row + i];
    for (int h = threadIdx.x; h < INDEX_HEADS; h += 256)
        weight[h] = weights ? weights[(i64)blockIdx.y * weights_row + h] * factor : 1.0f;
    __syncthreads();
    Pool pool;
    pool.ape = ape, pool.weight = pool_weight, pool.inv_freq = inv_freq, pool.eps = eps, pool.rope_scale = rope_scale;
    const int n = (position + 1) / BLOCK;
    for (int b = blockIdx.x * WARPS + warp; b < n; b += gridDim.x * WARPS) {
        pool_key(keys[warp], cache, pages, b, pool);
        float sum = 0.0f;
        for (int h = lane; h < INDEX_HEADS; h += WARP) {
            float dot = 0.0f;
            for (int d = 0; d < INDEX_WIDTH; ++d) dot = fmaf(queries[h * QUERY_ROW + d], keys[warp][d], dot);
            sum = fmaf(weight[h], dot < 0.0f ? 0.0f : dot, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) scores[(i64)blockIdx.y * most + b] = sum;
        __syncwarp();
    }
}
