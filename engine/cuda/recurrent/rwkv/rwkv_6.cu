// Time mixing of RWKV-6 behind its products. Of each head, a memory M of HEAD keys by HEAD values, for each token:
//     y = r . (M + (first * k) (x) v);  M = w * M + k (x) v;  out = norm(y) * silu(gate),  w = exp(-exp(what is given))
// LINEAR 1: k is multiplied by 1 - w, M changes before y = r . M / sqrt(HEAD), out = y * sigmoid(gate).
//
// r, w and gate: rows of heads * HEAD floats; k and v: of kv_heads * HEAD, which heads / kv_heads heads share; all with
// `stride` floats from row to row. first (heads, HEAD), norm and bias (heads * HEAD); null with LINEAR. memory: rows of
// (heads, HEAD values, HEAD keys). out (rows, heads * HEAD).
// LANES lanes hold the keys of a value, KEYS each. Prompts are computed token after token by the same operations however
// they are cut. Needs recurrent.cuh, rwkv_head.cuh and rwkv_6.cuh.

constexpr int LANES = 8;
constexpr int KEYS = floats_of_a_lane(HEAD, LANES);
constexpr int PADDED = KEYS * LANES;
static_assert(HEAD >= 1 && HEAD <= 128, "a lane holds at most 16 keys");

// M of a value becomes that behind the token; read: what r is multiplied with.
DEVICE void remember(float* m, const float* k, const float* w, const float* first, float v, float* read) {
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        const float pair = __fmul_rn(k[i], v);
        if (!LINEAR) read[i] = fmaf(first[i], pair, m[i]);
        m[i] = fmaf(w[i], m[i], pair);
        if (LINEAR) read[i] = m[i];
    }
}

DEVICE float opened(float gate) { return LINEAR ? logistic(gate) : silu(gate); }

// ---- decode steps ------------------------------------------------------------------------------------------------
constexpr int DECODE_THREADS = 512;
constexpr int AT_ONCE = DECODE_THREADS / LANES;  // values
constexpr int TURNS = (HEAD + AT_ONCE - 1) / AT_ONCE;

// One new token of each slot: row b is slot b. grid (heads, rows). A row with position -1 is left alone; at position 0 the
// memory is zero. Positions, offsets and memories in front are read before the wait: the first kernel of a step must not be
// launched early.
extern "C" __global__ void __launch_bounds__(DECODE_THREADS)
    rwkv_6_decode(const float* r, const float* w, const float* k, const float* v, const float* gate, int stride,
                  const float* first, const float* norm, const float* bias, float eps, float* memory, int places,
                  const int* positions, const int* offsets, float* out, int heads, int kv_heads) {
    __shared__ __align__(16) float rs[PADDED];
    __shared__ __align__(16) float ks[PADDED];
    __shared__ __align__(16) float ws[PADDED];
    __shared__ __align__(16) float firsts[PADDED];
    __shared__ float vs[HEAD], ys[HEAD];
    pdl_launch();
    const int row = blockIdx.y, position = positions[row], thread = threadIdx.x, lane = thread % LANES;
    if (position < 0) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads), offset = offsets[row];
    const i64 read = (i64)row * places + place_of(position - 1, offset, places);
    const i64 write = (i64)row * places + place_of(position, offset, places);
    float m[TURNS][KEYS];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int value = turn * AT_ONCE + thread / LANES;
        if (position > 0 && value < HEAD) {
            load_part<HEAD, LANES, KEYS, true>(memory + ((read * heads + head) * HEAD + value) * HEAD, lane, m[turn]);
        } else {
            clear_part<KEYS>(m[turn]);
        }
    }
    for (int i = HEAD + thread; i < PADDED; i += DECODE_THREADS) rs[i] = ks[i] = ws[i] = firsts[i] = 0.0f;
    pdl_wait();
    if (thread < HEAD) {
        const i64 of_head = (i64)row * stride + head * HEAD + thread, shared = (i64)row * stride + kv_head * HEAD + thread;
        float own_r = r[of_head], own_k = k[shared], own_w = w[of_head];
        prepare(own_r, own_k, own_w);
        rs[thread] = own_r, ks[thread] = own_k, ws[thread] = own_w, vs[thread] = v[shared];
        firsts[thread] = LINEAR ? 0.0f : first[head * HEAD + thread];
    }
    __syncthreads();
    float r_part[KEYS], k_part[KEYS], w_part[KEYS], first_part[KEYS];
    load_part<PADDED, LANES, KEYS, true>(rs, lane, r_part);
    load_part<PADDED, LANES, KEYS, true>(ks, lane, k_part);
    load_part<PADDED, LANES, KEYS, true>(ws, lane, w_part);
    load_part<PADDED, LANES, KEYS, true>(firsts, lane, first_part);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int value = turn * AT_ONCE + thread / LANES;
        float read_part[KEYS];
        remember(m[turn], k_part, w_part, first_part, value < HEAD ? vs[value] : 0.0f, read_part);
        const float y = dot_parts<LANES, KEYS>(r_part, read_part);
        if (value >= HEAD) continue;
        store_part<HEAD, LANES, KEYS>(memory + ((write * heads + head) * HEAD + value) * HEAD, lane, m[turn]);
        if (lane == 0) ys[value] = y;
    }
    __syncthreads();
    HeadNorm of = {0.0f, 1.0f};
    if (norm && thread < (HEAD + WARP - 1) / WARP * WARP) of = norm_of_head(ys, HEAD, thread % WARP, eps);
    if (thread >= HEAD) return;
    const int column = head * HEAD + thread;
    float y = (ys[thread] - of.mean) * of.factor;
    if (norm) y = fmaf(y, norm[column], bias[column]);
    out[(i64)row * heads * HEAD + column] = y * opened(gate[(i64)row * stride + column]);
}

// ---- prompts -----------------------------------------------------------------------------------------------------
constexpr int THREADS = 128;
constexpr int EACH = 2;  // values of a lane: inputs are read once for both
constexpr int GROUPS = THREADS / LANES;              // of lanes
constexpr int VALUES = GROUPS * EACH;                // of a head, that a block computes; shape.py has the same number
constexpr int PARTS = (HEAD + VALUES - 1) / VALUES;  // blocks of a head
constexpr int TOKENS = 8;                            // staged in shared memory at a time
constexpr int EACH_KEY = (TOKENS * HEAD + THREADS - 1) / THREADS;
constexpr int EACH_V = TOKENS * VALUES / THREADS;

struct Staged {
    float v[EACH_V], r[EACH_KEY], k[EACH_KEY], w[EACH_KEY];
};

// Rows of prompts, token after token. grid (heads * PARTS, spans). out is y, which rwkv_6_finish turns into the result.
// While a block computes TOKENS tokens out of shared memory, the next ones are on their way. Lanes leave their parts of y in
// shared memory, where they are added for all tokens at once. A span without a past starts from zero and reads no memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_6_prompt(const float* r, const float* w, const float* k, const float* v, int stride, const float* first,
                  float* memory, const PromptSpan* spans, float* out, int heads, int kv_heads) {
    __shared__ __align__(16) float rs[TOKENS][PADDED];
    __shared__ __align__(16) float ks[TOKENS][PADDED];
    __shared__ __align__(16) float ws[TOKENS][PADDED];
    __shared__ __align__(16) float firsts[PADDED];
    __shared__ float vs[TOKENS][VALUES], ys[TOKENS][LANES][VALUES + 4];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES;
    const int head = blockIdx.x / PARTS, begin_value = blockIdx.x % PARTS * VALUES, kv_head = head / (heads / kv_heads);
    for (int i = thread; i < TOKENS * PADDED; i += THREADS)
        rs[i / PADDED][i % PADDED] = ks[i / PADDED][i % PADDED] = ws[i / PADDED][i % PADDED] = 0.0f;
    for (int i = thread; i < PADDED; i += THREADS) firsts[i] = !LINEAR && i < HEAD ? first[head * HEAD + i] : 0.0f;
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD;
    float m[EACH][KEYS], first_part[KEYS];
    load_values<HEAD, LANES>(memory, span.read * size + head * HEAD, begin_value, GROUPS, mine, HEAD, span.n_past > 0, lane, m);
    auto load_inputs = [&](int begin, Staged& to) {
        const int n = min(TOKENS, span.n_rows - begin);
        const i64 row = span.row + begin;
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) {
            const int t = (i * THREADS + thread) / VALUES, value = begin_value + (i * THREADS + thread) % VALUES;
            to.v[i] = t < n && value < HEAD ? v[(row + t) * stride + kv_head * HEAD + value] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH_KEY; ++i) {
            const int t = (i * THREADS + thread) / HEAD, key = (i * THREADS + thread) % HEAD;
            to.r[i] = t < n ? r[(row + t) * stride + head * HEAD + key] : 0.0f;
            to.k[i] = t < n ? k[(row + t) * stride + kv_head * HEAD + key] : 0.0f;
            to.w[i] = t < n ? w[(row + t) * stride + head * HEAD + key] : 0.0f;
        }
    };
    Staged now, next;
    load_inputs(0, now);
    __syncthreads();  // what is padded is cleared
    load_part<PADDED, LANES, KEYS, true>(firsts, lane, first_part);
    for (int begin = 0; begin < span.n_rows; begin += TOKENS) {
        const int n = min(TOKENS, span.n_rows - begin);
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) vs[(i * THREADS + thread) / VALUES][(i * THREADS + thread) % VALUES] = now.v[i];
#pragma unroll
        for (int i = 0; i < EACH_KEY; ++i) {
            const int t = (i * THREADS + thread) / HEAD, key = (i * THREADS + thread) % HEAD;
            if (t >= TOKENS) continue;
            prepare(now.r[i], now.k[i], now.w[i]);
            rs[t][key] = now.r[i], ks[t][key] = now.k[i], ws[t][key] = now.w[i];
        }
        __syncthreads();
        if (begin + TOKENS < span.n_rows) load_inputs(begin + TOKENS, next);
#pragma unroll 2
        for (int t = 0; t < n; ++t) {
            float r_part[KEYS], k_part[KEYS], w_part[KEYS], read_part[KEYS];
            load_part<PADDED, LANES, KEYS, true>(rs[t], lane, r_part);
            load_part<PADDED, LANES, KEYS, true>(ks[t], lane, k_part);
            load_part<PADDED, LANES, KEYS, true>(ws[t], lane, w_part);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                remember(m[e], k_part, w_part, first_part, vs[t][e * GROUPS + mine], read_part);
                ys[t][lane][e * GROUPS + mine] = sum_of_products<KEYS>(r_part, read_part);
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) {
            const int t = (i * THREADS + thread) / VALUES, at = (i * THREADS + thread) % VALUES;
            if (t >= n || begin_value + at >= HEAD) continue;
            const float sum = sum_of_left(ys[t], at);
            out[(span.row + begin + t) * size + head * HEAD + begin_value + at] = sum;
        }
        now = next;
    }
    store_values<HEAD, LANES>(memory, span.write * size + head * HEAD, begin_value, GROUPS, mine, HEAD, lane, m);
}

// y = norm(y) * gate of each head, in place. A warp per head; grid: any that has rows * heads warps.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_6_finish(float* y, const float* gate, int stride, const float* norm, const float* bias, float eps, int rows,
                  int heads) {
    pdl_launch();
    pdl_wait();
    const i64 number = ((i64)blockIdx.x * THREADS + threadIdx.x) / WARP;
    if (number >= (i64)rows * heads) return;
    const i64 row = number / heads;
    const int head = (int)(number % heads), lane = threadIdx.x % WARP;
    float* const from = y + number * HEAD;
    const float* const gates = gate + row * stride + head * HEAD;
    HeadNorm of = {0.0f, 1.0f};
    if (norm) of = norm_of_head(from, HEAD, lane, eps);
    for (int i = lane; i < HEAD; i += WARP) {
        float value = (from[i] - of.mean) * of.factor;
        if (norm) value = fmaf(value, norm[head * HEAD + i], bias[head * HEAD + i]);
        from[i] = value * opened(gates[i]);
    }
}
