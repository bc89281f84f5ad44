// Scores that an indexer gives to the positions before a row, or with BY_HEAD to blocks of them, in float32; the twin that
// index_scores_half.cu is compared with.
//
// grid (X, T), 256 threads: the X blocks of a row share its positions; which of them computes a score does not change it. Rows
// with position -1 are left alone. q float32, q_row floats from row to row: [INDEX_HEADS][INDEX_WIDTH]. cache
// [pages][PAGE][INDEX_WIDTH]; block_table int32 [sequences][max_pages]; row_sequence, positions int32 [T].
//     scores[row][p] = sum over h of weights[row][h] * factor * max(0, q_h . k_p)             float32 [T][most]
//     BY_HEAD: scores[row][h][b] = the largest q_h . k_p of block b (BLOCK positions)         float32 [T][INDEX_HEADS][most]
// for all p up to the row's position. NaN stays NaN; a position without a page, which no row needs, is lowest.
// Defines: CACHE_HALF, PAGE, INDEX_HEADS, INDEX_WIDTH, BLOCK, BY_HEAD. Needs cache_numbers.cuh.

#define WARPS 8
#define STEP (INDEX_WIDTH % 4 == 0 ? 4 : 1)
#define AT_ONCE 8  // heads of which a lane has sums at the same time

// The key of a position; where there is none, some other one.
DEVICE const cache_t* key_at(const cache_t* cache, const int* pages, int p, bool& found) {
    const int page = found ? pages[p / PAGE] : -1;
    found = page >= 0;
    return cache + (found ? ((i64)page * PAGE + (p & (PAGE - 1))) * INDEX_WIDTH : 0);
}

// dots[i] = q of head first + i * stride times the key, where there is such a head.
DEVICE void multiply(float (&dots)[AT_ONCE], const float* q, const cache_t* key, int first, int stride) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) dots[i] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < INDEX_WIDTH; d += STEP) {
        float k[STEP];
        load_cached(k, key + d);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int h = first + i * stride;
            if (h >= INDEX_HEADS) continue;
#pragma unroll
            for (int e = 0; e < STEP; ++e) dots[i] = fmaf(q[h * INDEX_WIDTH + d + e], k[e], dots[i]);
        }
    }
}

// The larger one; NaN where one is NaN.
DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

extern "C" __global__ void __launch_bounds__(256)
    index_scores(const float* q, int q_row, const float* weights, int weights_row, float factor, const cache_t* cache,
                 const int* block_table, int max_pages, const int* row_sequence, const int* positions, float* scores,
                 int most) {
    __shared__ __align__(16) float queries[INDEX_HEADS * INDEX_WIDTH];
    __shared__ float weight[INDEX_HEADS];
    __shared__ float parts[WARPS][WARP];
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.y], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0) return;
    const int* pages = block_table + (i64)row_sequence[blockIdx.y] * max_pages;
    for (int i = threadIdx.x; i < INDEX_HEADS * INDEX_WIDTH; i += 256) queries[i] = q[(i64)blockIdx.y * q_row + i];
    for (int h = threadIdx.x; h < INDEX_HEADS; h += 256)
        weight[h] = BY_HEAD ? 1.0f : weights[(i64)blockIdx.y * weights_row + h] * factor;
    __syncthreads();
#if BY_HEAD
    // A warp has a block, a lane one of its positions at a time.
    for (int block = blockIdx.x * WARPS + warp; block <= position / BLOCK; block += gridDim.x * WARPS)
        for (int first = 0; first < INDEX_HEADS; first += AT_ONCE) {
            float highest[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) highest[i] = __uint_as_float(0xff800000u);
            for (int place = lane; place < BLOCK; place += WARP) {
                bool found = block * BLOCK + place <= position;
                const cache_t* key = key_at(cache, pages, block * BLOCK + place, found);
                if (!found) continue;
                float dots[AT_ONCE];
                multiply(dots, queries, key, first, 1);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) highest[i] = larger(highest[i], dots[i]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
                for (int offset = 16; offset > 0; offset >>= 1)
                    highest[i] = larger(highest[i], __shfl_xor_sync(FULL_MASK, highest[i], offset));
                if (lane == 0 && first + i < INDEX_HEADS)
                    scores[((i64)blockIdx.y * INDEX_HEADS + first + i) * most + block] = highest[i];
            }
        }
#else
    // A lane has a position, a warp every eighth head.
    for (int start = blockIdx.x * WARP; start <= position; start += gridDim.x * WARP) {
        bool found = start + lane <= position;
        const cache_t* key = key_at(cache, pages, start + lane, found);
        float sum = 0.0f;
        for (int first = warp; first < INDEX_HEADS; first += AT_ONCE * WARPS) {
            float dots[AT_ONCE];
            multiply(dots, queries, key, first, WARPS);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int h = first + i * WARPS;
                if (h < INDEX_HEADS) sum = fmaf(weight[h], dots[i] < 0.0f ? 0.0f : dots[i], sum);
            }
        }
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && start + lane <= position) {
            float total = 0.0f;
            for (int w = 0; w < WARPS; ++w) total += parts[w][lane];
            scores[(i64)blockIdx.y * most + start + lane] = found ? total : __uint_as_float(0xff800000u);
        }
        __syncthreads();
    }
#endif
}
