// Prompts of RWKV-7's time mixing, CHUNK tokens at a time: what rwkv_7.cu's rwkv_7_prompt computes token after token, from what
// rwkv_7_prepare leaves. With w_ij the product of the decays behind token j and in front of token i, and x_i = -(M u_i), which enters the
// memory with the keys u * a as v does with k:
//     A = u_i . (away_j * w_ij), B = u_i . (k_j * w_ij) for j < i;  P = r_i . (away_j * w_ij * w_i), O = r_i . (k_j * w_ij * w_i), j <= i,
// where the last two have (away_j, k_j alone for j = i). In the letters of chunk_walk.cuh L = -(1 + A)^-1 and N = L B; q, k, u and also are
// r and u times the decays in front (r's own with them), and u * a and k times those behind. Decays are multiplied and never divided by,
// so that strong ones lose nothing.
//
// chunked: rows of heads * CHUNKED floats: a token's record, q, and also. u and away are replaced by k and u of the walk, and w in the
// first row of a chunk by the decays of the whole chunk. Needs recurrent.cuh and chunk_walk.cuh.

constexpr int THREADS = WALK_THREADS;
constexpr int CHUNKED = PAIRED_RECORD + 2 * HEAD;
constexpr int STRIDE = walk_stride(HEAD);
constexpr int EACH = walk_stride(HEAD) / WARP;  // keys of a lane
static_assert(HEAD % 4 == 0 && HEAD <= 96, "rows are copied by 16 bytes; shared memory holds as many keys");

// What a walk needs of one chunk of one head. grid (heads, chunks). chunks: (span, its first row in the span).
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_7_chunks(const float* r, float* w, const float* k, float* u, float* away, int stride, const PromptSpan* spans,
                  const int2* chunks, float* chunked, int heads) {
    __shared__ float rs[CHUNK][STRIDE], ws[CHUNK][STRIDE], ks[CHUNK][STRIDE], us[CHUNK][STRIDE], aways[CHUNK][STRIDE];
    __shared__ float as[CHUNK][CHUNK + 1], bs[CHUNK][CHUNK + 1], ps[CHUNK][CHUNK + 1], os[CHUNK][CHUNK + 1];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % WARP, head = blockIdx.x;
    pdl_wait();
    const int2 chunk = chunks[blockIdx.y];
    const PromptSpan span = spans[chunk.x];
    const int n = chunk_rows(span, chunk.y);
    const i64 row = span.row + chunk.y, begin = row * stride + head * HEAD;
    for (int i = thread; i < CHUNK * STRIDE; i += THREADS) {
        const int t = i / STRIDE, key = i % STRIDE;
        const bool there = t < n && key < HEAD;
        const i64 at = begin + (i64)t * stride + key;
        rs[t][key] = there ? r[at] : 0.0f, ks[t][key] = there ? k[at] : 0.0f, ws[t][key] = there ? w[at] : 1.0f;
        us[t][key] = there ? u[at] : 0.0f, aways[t][key] = there ? away[at] : 0.0f;
    }
    __syncthreads();
    // A warp has a column j of all four at a time, a lane some keys, until the sums over keys: lane i then has A and B of row i, and
    // lane CHUNK + i has P and O.
    for (int j = thread / WARP; j < CHUNK; j += THREADS / WARP) {
        float of_x[EACH], of_v[EACH], sums_x[WARP], sums_v[WARP];
#pragma unroll
        for (int e = 0; e < EACH; ++e) of_x[e] = aways[j][e * WARP + lane], of_v[e] = ks[j][e * WARP + lane];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            sums_x[i] = sums_v[i] = sums_x[CHUNK + i] = sums_v[CHUNK + i] = 0.0f;
            if (i < j) continue;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int key = e * WARP + lane;
                if (i > j) {
                    sums_x[i] = fmaf(us[i][key], of_x[e], sums_x[i]);
                    sums_v[i] = fmaf(us[i][key], of_v[e], sums_v[i]);
                    of_x[e] = __fmul_rn(of_x[e], ws[i][key]), of_v[e] = __fmul_rn(of_v[e], ws[i][key]);
                }
                sums_x[CHUNK + i] = fmaf(rs[i][key], of_x[e], sums_x[CHUNK + i]);
                sums_v[CHUNK + i] = fmaf(rs[i][key], of_v[e], sums_v[CHUNK + i]);
            }
        }
        const float sum_x = sum_of_lanes<WARP>(sums_x), sum_v = sum_of_lanes<WARP>(sums_v);
        const int i = lane % CHUNK;
        (lane < CHUNK ? as : ps)[i][j] = sum_x, (lane < CHUNK ? bs : os)[i][j] = sum_v;
    }
    __syncthreads();
    float* const record = chunked + (row * heads + head) * CHUNKED;
    const i64 record_row = (i64)heads * CHUNKED;
    if (thread < WARP) {  // a column of L or of N, by substitution
        const int of = thread % CHUNK;
        const bool is_n = thread >= CHUNK;
        float column[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            float sum = is_n ? -bs[i][of] : i == of ? -1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; ++j) sum = fmaf(-as[i][j], column[j], sum);
            column[i] = sum;
            if (i < n) record[i * record_row + (is_n ? OF_N : 0) + of] = sum;
        }
    } else {
        for (int i = thread - WARP; i < n * CHUNK; i += THREADS - WARP) {
            float* const mine = record + i / CHUNK * record_row + i % CHUNK;
            mine[OF_P] = ps[i / CHUNK][i % CHUNK], mine[OF_O] = os[i / CHUNK][i % CHUNK];
        }
    }
    if (thread >= HEAD) return;
    float* const own = record + PAIRED_RECORD + thread;
    float before = 1.0f, behind = 1.0f;
    for (int t = 0; t < n; ++t) {
        u[begin + (i64)t * stride + thread] = __fmul_rn(us[t][thread], before);
        before = __fmul_rn(before, ws[t][thread]);
        own[t * record_row] = __fmul_rn(rs[t][thread], before);
    }
    w[begin + thread] = before;
    for (int t = n - 1; t >= 0; --t) {
        away[begin + (i64)t * stride + thread] = __fmul_rn(aways[t][thread], behind);
        own[t * record_row + HEAD] = __fmul_rn(ks[t][thread], behind);
        behind = __fmul_rn(behind, ws[t][thread]);
    }
}

// From chunk to chunk; w, u and away as rwkv_7_chunks leaves them. grid (heads * blocks of values, spans). out is y, which rwkv_7_finish
// turns into the result. A span without a past starts from zero and reads no memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_7_walk(const float* w, const float* v, const float* u, const float* away, int stride, const float* chunked, float* state,
                const PromptSpan* spans, float* out, int heads) {
    constexpr int SLICES = (HEAD + WALK_VALUES - 1) / WALK_VALUES;
    __shared__ __align__(16) WalkMemory<HEAD, true, true, true> memory;
    pdl_launch();
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * WALK_VALUES;
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD * HEAD, mine = (i64)head * HEAD * HEAD;
    const Rows record = {chunked + head * CHUNKED, (i64)heads * CHUNKED};
    const Rows q = {record.rows + PAIRED_RECORD, record.stride}, also = {q.rows + HEAD, record.stride};
    const auto part = [&](const float* of) { return Rows{of + head * HEAD, stride}; };
    walk_chunks<HEAD, HEAD, true, true, true>(
        memory, {q, part(u), part(away), part(v), record, part(w), also},
        span.n_past > 0 ? state + span.read * size + mine : nullptr, state + span.write * size + mine, span, first,
        [](i64, int) { return 0.0f; }, [&](i64 row, int value, float y, float, float) { out[(row * heads + head) * HEAD + value] = y; });
}
