// Prompts of Mamba 2, CHUNK tokens at a time: what mamba_2.cu's mamba_2_prompt computes token after token, with the same arguments.
// In the letters of chunk_walk.cuh q is C, k is B and v is x; P = (C_i . B_j) * r_ij * step_j for j <= i, where r_ij is the product
// of the decays behind token j up to i (Dao and Gu, arXiv 2405.21060).
//
// chunked: rows of heads * RECORD floats, a token's records, of which those of L are not used.

constexpr int THREADS = WALK_THREADS;
constexpr int STRIDE = walk_stride(D_STATE);
constexpr int EACH = walk_stride(D_STATE) / WARP;  // states of a lane
static_assert(D_STATE % 4 == 0, "rows are copied by 16 bytes");

// What a walk needs of one chunk of the heads of a group. grid (groups, chunks). chunks: (span, its first row in the span).
extern "C" __global__ void __launch_bounds__(THREADS)
    mamba_2_chunks(const float* mixed, int mixed_row, const float* convolved, const float* dt_bias, const float* a,
                   const PromptSpan* spans, const int2* chunks, float* chunked, int heads, int groups) {
    __shared__ float bs[CHUNK][STRIDE], cs[CHUNK][STRIDE], products[CHUNK][CHUNK + 1];
    __shared__ float steps[THREADS / CHUNK][CHUNK], decays[THREADS / CHUNK][CHUNK];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % WARP, group = blockIdx.x, sharing = heads / groups;
    const int inner = heads * HEAD, channels = inner + 2 * groups * D_STATE;
    pdl_wait();
    const int2 chunk = chunks[blockIdx.y];
    const PromptSpan span = spans[chunk.x];
    const int n = chunk_rows(span, chunk.y);
    const i64 row = span.row + chunk.y;
    const float* const of_b = convolved + row * channels + inner + group * D_STATE;
    for (int i = thread; i < CHUNK * STRIDE; i += THREADS) {
        const int t = i / STRIDE, state = i % STRIDE;
        const bool there = t < n && state < D_STATE;
        bs[t][state] = there ? of_b[(i64)t * channels + state] : 0.0f;
        cs[t][state] = there ? of_b[(i64)t * channels + groups * D_STATE + state] : 0.0f;
    }
    __syncthreads();
    for (int j = thread / WARP; j < CHUNK; j += THREADS / WARP) {  // a warp has a column at a time, a lane some states
        float mine[EACH], sums[CHUNK];
#pragma unroll
        for (int e = 0; e < EACH; ++e) mine[e] = bs[j][e * WARP + lane];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            sums[i] = 0.0f;
            if (i < j) continue;
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[i] = fmaf(cs[i][e * WARP + lane], mine[e], sums[i]);
        }
        const float sum = sum_of_lanes<CHUNK>(sums);
        if (lane < CHUNK) products[lane][j] = sum;
    }
    const int t = thread % CHUNK, of = thread / CHUNK;  // the token that this thread has, of one of some heads at a time
    for (int first = 0; first < sharing; first += THREADS / CHUNK) {
        const int head = group * sharing + first + of;
        const bool there = first + of < sharing && t < n;
        __syncthreads();  // all threads see `products` and have finished reading the previous heads' steps
        float step = 0.0f, decay = 1.0f;
        if (there) {
            step = softplus(mixed[(row + t) * mixed_row + inner + channels + head] + dt_bias[head]);
            decay = expf(__fmul_rn(step, a[head]));
        }
        steps[of][t] = step, decays[of][t] = decay;
        __syncthreads();
        if (!there) continue;
        float before = 1.0f, behind = 1.0f, all = 1.0f;
        for (int i = 0; i < n; ++i) {
            all = __fmul_rn(all, decays[of][i]);
            if (i <= t) before = __fmul_rn(before, decays[of][i]);
            if (i > t) behind = __fmul_rn(behind, decays[of][i]);
        }
        float* const record = chunked + ((row + t) * heads + head) * RECORD;
        float between = 1.0f, ps[CHUNK];
#pragma unroll
        for (int j = CHUNK - 1; j >= 0; --j) {
            ps[j] = j <= t ? __fmul_rn(__fmul_rn(products[t][j], between), steps[of][j]) : 0.0f;
            if (j <= t) between = __fmul_rn(between, decays[of][j]);
        }
#pragma unroll
        for (int j = 0; j < CHUNK; j += 4)
            *(float4*)(record + OF_P + j) = make_float4(ps[j], ps[j + 1], ps[j + 2], ps[j + 3]);
        *(float4*)(record + OF_BETA) = make_float4(0.0f, 0.0f, before, __fmul_rn(behind, step));
        record[OF_CHUNK] = all;
    }
}

// From chunk to chunk. grid (heads * blocks of channels, spans). A span without a past starts from zero and reads no state.
extern "C" __global__ void __launch_bounds__(THREADS)
    mamba_2_walk(const float* mixed, int mixed_row, const float* convolved, const float* d, const float* chunked, float* state,
                 const PromptSpan* spans, float* out, int heads, int groups) {
    constexpr int SLICES = (HEAD + WALK_VALUES - 1) / WALK_VALUES;
    __shared__ __align__(16) WalkMemory<D_STATE, false, false, false> memory;
    pdl_launch();
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * WALK_VALUES, group = head / (heads / groups);
    const int inner = heads * HEAD, channels = inner + 2 * groups * D_STATE;
    const float skip = d[head];
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)inner * D_STATE, mine = (i64)head * HEAD * D_STATE;
    const Rows b = {convolved + inner + group * D_STATE, channels}, c = {b.rows + groups * D_STATE, channels};
    const Rows x = {convolved + head * HEAD, channels}, record = {chunked + head * RECORD, (i64)heads * RECORD};
    walk_chunks<D_STATE, HEAD, false, false, false>(
        memory, {c, b, b, x, record, record}, span.n_past > 0 ? state + span.read * size + mine : nullptr,
        state + span.write * size + mine, span, first,
        [&](i64 row, int channel) { return mixed[row * mixed_row + head * HEAD + channel]; },
        [&](i64 row, int channel, float y, float of_x, float z) {
            out[row * inner + head * HEAD + channel] = gated(y, skip, of_x, z);
        });
}
