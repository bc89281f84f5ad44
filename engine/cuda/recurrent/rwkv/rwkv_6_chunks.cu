// Prompts of RWKV-6's time mixing, CHUNK tokens at a time: what rwkv_6.cu's rwkv_6_prompt computes token after token, with the same
// arguments. In the letters of chunk_walk.cuh q is r times the decays in front of it, and u is k times those behind it; with w_ij the
// product of the decays behind token j and in front of token i:
//     P = (first * r_i) . k_i for j = i, else r_i . (k_j * w_ij);  LINEAR: the decay of token i is in w_ij, and P_ii = r_i . k_i
// (Yang et al., "Gated linear attention transformers with hardware-efficient training", arXiv 2312.06635). Decays are multiplied and
// never divided by, so that strong ones lose nothing.
//
// chunked: rows of heads * CHUNKED floats: a token's record, of which those of L are not used, and u. r is replaced by q, and w in the
// first row of a chunk by the decays of the whole chunk. Needs recurrent.cuh, chunk_walk.cuh and rwkv_6.cuh.

constexpr int THREADS = WALK_THREADS;
constexpr int CHUNKED = RECORD + HEAD;
constexpr int STRIDE = walk_stride(HEAD);
constexpr int EACH = walk_stride(HEAD) / WARP;  // keys of a lane
static_assert(HEAD % 4 == 0 && HEAD <= 128, "rows are copied by 16 bytes; a thread has a key");

// What a walk needs of one chunk of one head. grid (heads, chunks). chunks: (span, its first row in the span).
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_6_chunks(float* r, float* w, const float* k, int stride, const float* first, const PromptSpan* spans, const int2* chunks,
                  float* chunked, int heads, int kv_heads) {
    __shared__ float rs[CHUNK][STRIDE], ks[CHUNK][STRIDE], ws[CHUNK][STRIDE], products[CHUNK][CHUNK + 1];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % WARP, head = blockIdx.x, kv_head = head / (heads / kv_heads);
    pdl_wait();
    const int2 chunk = chunks[blockIdx.y];
    const PromptSpan span = spans[chunk.x];
    const int n = chunk_rows(span, chunk.y);
    const i64 row = span.row + chunk.y;
    float* const of_r = r + row * stride + head * HEAD;
    float* const of_w = w + row * stride + head * HEAD;
    for (int i = thread; i < CHUNK * STRIDE; i += THREADS) {
        const int t = i / STRIDE, key = i % STRIDE;
        float own_r = 0.0f, own_k = 0.0f, own_w = 1.0f;
        if (t < n && key < HEAD) {
            own_r = of_r[(i64)t * stride + key], own_w = of_w[(i64)t * stride + key];
            own_k = k[(row + t) * stride + kv_head * HEAD + key];
            prepare(own_r, own_k, own_w);
        }
        rs[t][key] = own_r, ks[t][key] = own_k, ws[t][key] = own_w;
    }
    __syncthreads();
    for (int j = thread / WARP; j < CHUNK; j += THREADS / WARP) {  // a warp has a column at a time, a lane some keys
        float mine[EACH], sums[CHUNK];
#pragma unroll
        for (int e = 0; e < EACH; ++e) mine[e] = ks[j][e * WARP + lane];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            sums[i] = 0.0f;
            if (i < j) continue;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int key = e * WARP + lane;
                if (LINEAR && i > j) mine[e] = __fmul_rn(mine[e], ws[i][key]);
                const float now = LINEAR || i > j || key >= HEAD ? mine[e] : __fmul_rn(mine[e], first[head * HEAD + key]);
                sums[i] = fmaf(rs[i][key], now, sums[i]);
                if (!LINEAR && i > j) mine[e] = __fmul_rn(mine[e], ws[i][key]);
            }
        }
        const float sum = sum_of_lanes<CHUNK>(sums);
        if (lane < CHUNK) products[lane][j] = sum;
    }
    __syncthreads();
    float* const record = chunked + (row * heads + head) * CHUNKED;
    const i64 record_row = (i64)heads * CHUNKED;
    for (int i = thread; i < n * CHUNK; i += THREADS) {
        const int t = i / CHUNK, j = i % CHUNK;
        record[t * record_row + OF_P + j] = j <= t ? products[t][j] : 0.0f;
        if (j == 0) record[t * record_row + OF_Q] = record[t * record_row + OF_V] = 1.0f;
    }
    if (thread >= HEAD) return;
    float before = 1.0f, behind = 1.0f;
    for (int t = 0; t < n; ++t) {
        if (LINEAR) before = __fmul_rn(before, ws[t][thread]);
        of_r[(i64)t * stride + thread] = __fmul_rn(rs[t][thread], before);
        if (!LINEAR) before = __fmul_rn(before, ws[t][thread]);
    }
    of_w[thread] = before;
    for (int t = n - 1; t >= 0; --t) {
        record[t * record_row + RECORD + thread] = __fmul_rn(ks[t][thread], behind);
        behind = __fmul_rn(behind, ws[t][thread]);
    }
}

// From chunk to chunk; r and w as rwkv_6_chunks leaves them. grid (heads * blocks of values, spans). out is y, which rwkv_6_finish
// turns into the result. A span without a past starts from zero and reads no memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_6_walk(const float* r, const float* w, const float* v, int stride, const float* chunked, float* state,
                const PromptSpan* spans, float* out, int heads, int kv_heads) {
    constexpr int SLICES = (HEAD + WALK_VALUES - 1) / WALK_VALUES;
    __shared__ __align__(16) WalkMemory<HEAD, false, true, false> memory;
    pdl_launch();
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * WALK_VALUES, kv_head = head / (heads / kv_heads);
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD * HEAD, mine = (i64)head * HEAD * HEAD;
    const Rows record = {chunked + head * CHUNKED, (i64)heads * CHUNKED}, u = {record.rows + RECORD, record.stride};
    const Rows q = {r + head * HEAD, stride}, decays = {w + head * HEAD, stride}, of_v = {v + kv_head * HEAD, stride};
    walk_chunks<HEAD, HEAD, false, true, false>(
        memory, {q, q, u, of_v, record, decays}, span.n_past > 0 ? state + span.read * size + mine : nullptr,
        state + span.write * size + mine, span, first,
        [](i64, int) { return 0.0f; }, [&](i64 row, int value, float y, float, float) { out[(row * heads + head) * HEAD + value] = y; });
}
