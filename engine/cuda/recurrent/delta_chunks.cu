// Gated delta rules of prompts, CHUNK tokens at a time: what delta.cu's delta_prompt computes token after token, with the same
// arguments. With r the products of decays from a chunk's begin to a token, r_ij those behind token j up to i:
//     A = beta_i * (k_i . k_j) * r_ij for j < i;  L = (1 + A)^-1;  P = (q_i . k_j) * r_ij for j <= i
// (Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", arXiv 2406.06484, and 2412.06464).
// Decays are multiplied and never divided by, so that strong ones lose nothing.
//
// chunked: rows of heads * CHUNKED floats: a token's record, and (KIMI) keys as they enter the memory and decays of the chunk.
// KIMI: q and k are replaced in convolved, as decays of keys do not come out of the products.

constexpr int THREADS = WALK_THREADS;
constexpr int CHUNKED = RECORD + (KIMI ? 2 * HEAD : 0);
constexpr int STRIDE = walk_stride(HEAD);
constexpr int EACH = walk_stride(HEAD) / WARP;  // keys of a lane
static_assert(HEAD % 4 == 0 && HEAD <= 128, "rows are copied by 16 bytes; a thread has a key");

// What a walk needs of one chunk of one head. grid (heads, chunks). chunks: (span, its first row in the span).
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_chunks(float* convolved, const float* beta, int beta_row, const float* steps, int steps_row, const float* dt_bias,
                 const float* a, float eps, const PromptSpan* spans, const int2* chunks, float* chunked, int heads,
                 int key_heads, int grouped) {
    __shared__ __align__(16) float qs[CHUNK][STRIDE];
    __shared__ __align__(16) float ks[CHUNK][STRIDE];
    __shared__ float decays[CHUNK][KIMI ? STRIDE : 1], betas[CHUNK], factors[2][CHUNK];
    __shared__ float as[CHUNK][CHUNK + 1], ps[CHUNK][CHUNK + 1];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % WARP, head = blockIdx.x;
    const int key_head = grouped ? head / (heads / key_heads) : head % key_heads;
    const int keys = key_heads * HEAD, channels = 2 * keys + heads * HEAD, first_step = KIMI ? head * HEAD : head;
    const float rate = a[head];
    pdl_wait();
    const int2 chunk = chunks[blockIdx.y];
    const PromptSpan span = spans[chunk.x];
    const int n = chunk_rows(span, chunk.y);
    const i64 row = span.row + chunk.y;
    float* const of_q = convolved + row * channels + key_head * HEAD;
    float* const of_k = of_q + keys;
    for (int i = thread; i < CHUNK * STRIDE; i += THREADS) {
        const int t = i / STRIDE, key = i % STRIDE;
        const bool there = t < n && key < HEAD;
        qs[t][key] = there ? of_q[(i64)t * channels + key] : 0.0f;
        ks[t][key] = there ? of_k[(i64)t * channels + key] : 0.0f;
        if (KIMI) {
            const float step = there ? steps[(row + t) * steps_row + first_step + key] : 0.0f;
            decays[t][key] = there ? decay_of_step(step + dt_bias[first_step + key], rate, FLOOR) : 1.0f;
        }
    }
    if (thread < CHUNK) {
        const bool there = thread < n;
        betas[thread] = there ? logistic(beta[(row + thread) * beta_row + head]) : 0.0f;
        if (!KIMI) {
            const float step = there ? steps[(row + thread) * steps_row + first_step] : 0.0f;
            decays[thread][0] = there ? decay_of_step(step + dt_bias[first_step], rate, FLOOR) : 1.0f;
        }
    }
    __syncthreads();
    {  // lengths: four lanes have a vector
        const int number = thread / 4, t = number % CHUNK;
        const float* const of = number < CHUNK ? qs[t] : ks[t];
        float sum = 0.0f;
        for (int i = thread % 4; i < HEAD; i += 4) sum = fmaf(of[i], of[i], sum);
        sum = __fadd_rn(sum, __shfl_xor_sync(FULL_MASK, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(FULL_MASK, sum, 2));
        const float length = sum + (UNIT_EPSILON > 0.0f ? UNIT_EPSILON : eps);
        const float scaled = number < CHUNK ? __fmul_rn(length, (float)HEAD) : length;
        if (thread % 4 == 0) factors[number / CHUNK][t] = t < n ? 1.0f / sqrtf(scaled) : 0.0f;
    }
    __syncthreads();
    // A warp has a column j of A and P at a time, a lane some keys, until the sums over keys: lane i then has q_i . k_j, and
    // lane CHUNK + i has k_i . k_j.
    for (int j = thread / WARP; j < CHUNK; j += THREADS / WARP) {
        float mine[EACH], sums[WARP];
#pragma unroll
        for (int e = 0; e < EACH; ++e) mine[e] = ks[j][e * WARP + lane];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            sums[i] = sums[CHUNK + i] = 0.0f;
            if (i < j) continue;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                if (KIMI && i > j) mine[e] = __fmul_rn(mine[e], decays[i][e * WARP + lane]);
                sums[i] = fmaf(qs[i][e * WARP + lane], mine[e], sums[i]);
                sums[CHUNK + i] = fmaf(ks[i][e * WARP + lane], mine[e], sums[CHUNK + i]);
            }
        }
        const float sum = sum_of_lanes<WARP>(sums);
        const int i = lane % CHUNK, of = lane / CHUNK;
        float between = 1.0f;
        if (!KIMI)
            for (int t = j + 1; t <= i; ++t) between = __fmul_rn(between, decays[t][0]);
        const float product = __fmul_rn(__fmul_rn(sum, between), __fmul_rn(factors[of][i], factors[1][j]));
        if (of == 0) ps[i][j] = product;
        if (of == 1) as[i][j] = i > j ? __fmul_rn(betas[i], product) : 0.0f;
    }
    __syncthreads();
    float* const record = chunked + (row * heads + head) * CHUNKED;
    const i64 record_row = (i64)heads * CHUNKED;
    if (thread < CHUNK) {  // a column of L
        float column[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            float sum = i == thread ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; ++j) sum = fmaf(-as[i][j], column[j], sum);
            column[i] = sum;
            if (i < n) record[i * record_row + thread] = sum;
        }
    } else if (thread >= WARP && thread < WARP + CHUNK) {  // a token's numbers
        const int t = thread - WARP;
        float before = 1.0f, behind = 1.0f, all = 1.0f;
        for (int i = 0; !KIMI && i < n; ++i) {
            all = __fmul_rn(all, decays[i][0]);
            if (i <= t) before = __fmul_rn(before, decays[i][0]);
            if (i > t) behind = __fmul_rn(behind, decays[i][0]);
        }
        float* const mine = record + t * record_row;
        if (t < n) {
            mine[OF_BETA] = betas[t], mine[OF_CHUNK] = all;
            mine[OF_K] = KIMI ? 1.0f : __fmul_rn(before, factors[1][t]);
            mine[OF_Q] = KIMI ? 1.0f : __fmul_rn(before, factors[0][t]);
            mine[OF_V] = KIMI ? 1.0f : __fmul_rn(behind, factors[1][t]);
        }
    } else if (thread >= 2 * WARP) {
        for (int i = thread - 2 * WARP; i < n * CHUNK; i += 2 * WARP)
            record[i / CHUNK * record_row + OF_P + i % CHUNK] = i % CHUNK <= i / CHUNK ? ps[i / CHUNK][i % CHUNK] : 0.0f;
    }
    if (KIMI && thread < HEAD) {
        float before = 1.0f, behind = 1.0f;
        for (int t = 0; t < n; ++t) {
            before = __fmul_rn(before, decays[t][thread]);
            of_q[(i64)t * channels + thread] = __fmul_rn(qs[t][thread], __fmul_rn(before, factors[0][t]));
            of_k[(i64)t * channels + thread] = __fmul_rn(ks[t][thread], __fmul_rn(before, factors[1][t]));
        }
        record[RECORD + HEAD + thread] = before;
        for (int t = n - 1; t >= 0; --t) {
            record[t * record_row + RECORD + thread] = __fmul_rn(ks[t][thread], __fmul_rn(behind, factors[1][t]));
            behind = __fmul_rn(behind, decays[t][thread]);
        }
    }
}

// From chunk to chunk. grid (heads * blocks of values, spans). out is y, which delta_finish turns into the result. A span without a
// past starts from zero and reads no state.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_walk(const float* convolved, const float* chunked, float* state, const PromptSpan* spans, float* out, int heads,
               int key_heads, int grouped) {
    constexpr int SLICES = (HEAD + WALK_VALUES - 1) / WALK_VALUES;
    __shared__ __align__(16) WalkMemory<HEAD, true, KIMI, false> memory;
    pdl_launch();
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * WALK_VALUES;
    const int key_head = grouped ? head / (heads / key_heads) : head % key_heads;
    const int keys = key_heads * HEAD, channels = 2 * keys + heads * HEAD;
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD * HEAD, mine = (i64)head * HEAD * HEAD;
    const float* const record = chunked + head * CHUNKED;
    const i64 record_row = (i64)heads * CHUNKED;
    const Rows q = {convolved + key_head * HEAD, channels}, k = {q.rows + keys, channels};
    const Rows v = {convolved + 2 * keys + head * HEAD, channels};
    const WalkInputs inputs = {q, k, {record + RECORD, record_row}, v, {record, record_row}, {record + RECORD + HEAD, record_row}};
    walk_chunks<HEAD, HEAD, true, KIMI, false>(
        memory, inputs, span.n_past > 0 ? state + span.read * size + mine : nullptr, state + span.write * size + mine, span, first,
        [](i64, int) { return 0.0f; }, [&](i64 row, int value, float y, float, float) { out[(row * heads + head) * HEAD + value] = y; });
}
