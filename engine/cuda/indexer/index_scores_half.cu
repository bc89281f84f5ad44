// Scores of single positions on the tensor cores, for a float16 cache: grid, arguments and results as in
// index_scores_plain.cu, without BY_HEAD; up to 64 heads of a width that is a multiple of 16, up to 128.
//
// A block takes a page of 64 positions at a time. The heads are the rows of the products and the positions their columns;
// the warps share both. Queries stay in registers, each two float16 numbers, so that products are as exact as float32 sums.
// Needs cache_numbers.cuh.

#define WARPS 8
#define K_STEPS (INDEX_WIDTH / 16)
#define HEAD_TILES ((INDEX_HEADS + 15) / 16)
#define HEAD_WARPS (HEAD_TILES > 2 ? 4 : HEAD_TILES)  // warps with different heads
#define EACH (HEAD_WARPS)                             // tiles of 8 positions of a warp: the page has 8

static_assert(PAGE == 64 && CACHE_HALF && INDEX_WIDTH % 16 == 0 && HEAD_TILES <= 4, "other shapes go elsewhere");

DEVICE float positive(float v) { return v < 0.0f ? 0.0f : v; }  // NaN stays

extern "C" __global__ void __launch_bounds__(256)
    index_scores(const float* q, int q_row, const float* weights, int weights_row, float factor, const cache_t* cache,
                 const int* block_table, int max_pages, const int* row_sequence, const int* positions, float* scores,
                 int most) {
    __shared__ float parts[HEAD_WARPS][PAGE];
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.y], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0 || blockIdx.x > position / PAGE) return;
    const int* pages = block_table + (i64)row_sequence[blockIdx.y] * max_pages;
    const int g = lane >> 2, t = lane & 3, head0 = warp % HEAD_WARPS * 16, first = warp / HEAD_WARPS * EACH * 8;
    u32 high[K_STEPS][4], low[K_STEPS][4];
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int h = head0 + g + i * 8;
        weight[i] = h < INDEX_HEADS ? weights[(i64)blockIdx.y * weights_row + h] * factor : 0.0f;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = (h < INDEX_HEADS ? h : 0) * INDEX_WIDTH + k * 16 + half * 8 + 2 * t;
                const float* from = q + (i64)blockIdx.y * q_row + at;
                const float x = h < INDEX_HEADS ? from[0] : 0.0f, y = h < INDEX_HEADS ? from[1] : 0.0f;
                const u32 rounded = two_halves(x, y);
                high[k][2 * half + i] = rounded;
                low[k][2 * half + i] = two_halves(x - low_half(rounded), y - high_half(rounded));
            }
    }
#pragma unroll 1
    for (int tile = blockIdx.x; tile <= position / PAGE; tile += gridDim.x) {
        const int page = pages[tile];
        const cache_t* keys = cache + (i64)max(page, 0) * PAGE * INDEX_WIDTH;
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            const cache_t* key = keys + (first + n * 8 + g) * INDEX_WIDTH + 2 * t;
            float d[4] = {};
#pragma unroll
            for (int k = 0; k < K_STEPS; ++k) {
                const u32 b0 = *(const u32*)(key + k * 16), b1 = *(const u32*)(key + k * 16 + 8);
                mma16(d, high[k][0], high[k][1], high[k][2], high[k][3], b0, b1);
                mma16(d, low[k][0], low[k][1], low[k][2], low[k][3], b0, b1);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float sum = fmaf(weight[1], positive(d[2 + e]), __fmul_rn(weight[0], positive(d[e])));
#pragma unroll
                for (int offset = 4; offset < WARP; offset <<= 1) sum += __shfl_xor_sync(FULL_MASK, sum, offset);
                if (g == 0) parts[warp % HEAD_WARPS][first + n * 8 + 2 * t + e] = sum;
            }
        }
        __syncthreads();
        const int p = tile * PAGE + threadIdx.x;
        if (threadIdx.x < PAGE && p <= position) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < HEAD_WARPS; ++w) total += parts[w][threadIdx.x];
            scores[(i64)blockIdx.y * most + p] = page >= 0 ? total : __uint_as_float(0xff800000u);
        }
        __syncthreads();
    }
}
