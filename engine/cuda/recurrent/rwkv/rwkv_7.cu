// Time mixing of RWKV-7 behind its products. Of each head, a memory M of HEAD values by HEAD keys, for each token:
//     w = exp(-exp(-1/2) * sigmoid(w));  a = sigmoid(a);  v = v + (v_first - v) * sigmoid(f)
//     u = k * k_k / max(|k * k_k|, 1e-12);  k = k + (a - 1) * k * k_a
//     M = M * w - (M u) (x) (u * a) + v (x) k, where w multiplies the keys;  y = M r
//     out = (norm(y) + (sum of r * k * r_k) v) * gate
//
// r, w, k, v, a, f and gate: rows of heads * HEAD floats, `stride` floats from row to row; gate null: of 1. first: rows of
// first_row floats, v_first, which a layer without f (null) writes. k_k, k_a, r_k, norm and bias (heads * HEAD); norm and bias
// null: none. memory: rows of (heads, HEAD values, HEAD keys). out (rows, heads * HEAD).
// LANES lanes hold the keys of a value, KEYS each. Prompts are computed token after token by the same operations however
// they are cut. Needs recurrent.cuh and rwkv_head.cuh.

constexpr int LANES = 8;
constexpr int KEYS = floats_of_a_lane(HEAD, LANES);
constexpr int PADDED = KEYS * LANES;
static_assert(HEAD >= 1 && HEAD <= 128, "a lane holds at most 16 keys");
constexpr float DECAY = -0.60653065971263342f;  // -exp(-1/2)
constexpr float SHORTEST = 1e-12f;

// M of a value becomes that behind the token. away: u * a.
DEVICE void remember(float* m, const float* w, const float* k, const float* u, const float* away, float v) {
    const float known = -dot_parts<LANES, KEYS>(m, u);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) m[i] = fmaf(v, k[i], fmaf(known, away[i], __fmul_rn(m[i], w[i])));
}

DEVICE float decay_of(float w) { return expf(__fmul_rn(DECAY, logistic(w))); }
DEVICE float key_of(float k, float a, float k_a) {
    const float changed = __fmul_rn(k, k_a);
    return __fadd_rn(k, fmaf(a, changed, -changed));
}
DEVICE float value_of(float v, float first, float f) { return fmaf(first - v, logistic(f), v); }

// ---- decode steps ------------------------------------------------------------------------------------------------
constexpr int DECODE_THREADS = 512;
constexpr int AT_ONCE = DECODE_THREADS / LANES;  // values
constexpr int TURNS = (HEAD + AT_ONCE - 1) / AT_ONCE;

// One new token of each slot: row b is slot b. grid (heads, rows). A row with position -1 is left alone; at position 0 the
// memory is zero. Positions, offsets and memories in front are read before the wait: the first kernel of a step must not be
// launched early.
extern "C" __global__ void __launch_bounds__(DECODE_THREADS)
    rwkv_7_decode(const float* r, const float* w, const float* k, const float* v, const float* a, const float* f,
                  const float* gate, int stride, float* first, int first_row, const float* k_k, const float* k_a,
                  const float* r_k, const float* norm, const float* bias, float eps, float* memory, int places,
                  const int* positions, const int* offsets, float* out, int heads) {
    __shared__ __align__(16) float rs[PADDED];
    __shared__ __align__(16) float ws[PADDED];
    __shared__ __align__(16) float ks[PADDED];
    __shared__ __align__(16) float us[PADDED];
    __shared__ __align__(16) float aways[PADDED];
    __shared__ float vs[HEAD], ys[HEAD], scratch[32];
    pdl_launch();
    const int row = blockIdx.y, position = positions[row], thread = threadIdx.x, lane = thread % LANES;
    if (position < 0) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int head = blockIdx.x, offset = offsets[row], column = head * HEAD + thread;
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
    for (int i = HEAD + thread; i < PADDED; i += DECODE_THREADS) rs[i] = ws[i] = ks[i] = us[i] = aways[i] = 0.0f;
    pdl_wait();
    float own_a = 0.0f, u = 0.0f, bonus = 0.0f;
    const i64 at = (i64)row * stride + column;
    if (thread < HEAD) {
        const float own_r = r[at], given = k[at];
        own_a = logistic(a[at]), u = __fmul_rn(given, k_k[column]);
        const float own_k = key_of(given, own_a, k_a[column]);
        rs[thread] = own_r, ws[thread] = decay_of(w[at]), ks[thread] = own_k;
        bonus = __fmul_rn(__fmul_rn(own_k, own_r), r_k[column]);
        float* const of_first = first + (i64)row * first_row + column;
        if (f) vs[thread] = value_of(v[at], *of_first, f[at]);
        else vs[thread] = *of_first = v[at];
    }
    const float length = sqrtf(block_sum(__fmul_rn(u, u), scratch));
    bonus = block_sum(bonus, scratch);
    if (thread < HEAD) {
        u /= fmaxf(length, SHORTEST);
        us[thread] = u, aways[thread] = __fmul_rn(u, own_a);
    }
    __syncthreads();
    float r_part[KEYS], w_part[KEYS], k_part[KEYS], u_part[KEYS], away_part[KEYS];
    load_part<PADDED, LANES, KEYS, true>(rs, lane, r_part);
    load_part<PADDED, LANES, KEYS, true>(ws, lane, w_part);
    load_part<PADDED, LANES, KEYS, true>(ks, lane, k_part);
    load_part<PADDED, LANES, KEYS, true>(us, lane, u_part);
    load_part<PADDED, LANES, KEYS, true>(aways, lane, away_part);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int value = turn * AT_ONCE + thread / LANES;
        remember(m[turn], w_part, k_part, u_part, away_part, value < HEAD ? vs[value] : 0.0f);
        const float y = dot_parts<LANES, KEYS>(m[turn], r_part);
        if (value >= HEAD) continue;
        store_part<HEAD, LANES, KEYS>(memory + ((write * heads + head) * HEAD + value) * HEAD, lane, m[turn]);
        if (lane == 0) ys[value] = y;
    }
    __syncthreads();
    HeadNorm of = {0.0f, 1.0f};
    if (norm && thread < (HEAD + WARP - 1) / WARP * WARP) of = norm_of_head(ys, HEAD, thread % WARP, eps);
    if (thread >= HEAD) return;
    float y = (ys[thread] - of.mean) * of.factor;
    if (norm) y = fmaf(y, norm[column], bias[column]);
    y = fmaf(vs[thread], bonus, y);
    out[(i64)row * heads * HEAD + column] = gate ? y * gate[at] : y;
}

// ---- prompts -----------------------------------------------------------------------------------------------------
constexpr int THREADS = 128;
constexpr int EACH = 2;  // values of a lane: two chains of operations hide each other's waits, and inputs are read once for both
constexpr int GROUPS = THREADS / LANES;              // of lanes
constexpr int VALUES = GROUPS * EACH;                // of a head, that a block computes; shape.py has the same number
constexpr int PARTS = (HEAD + VALUES - 1) / VALUES;  // blocks of a head
constexpr int TOKENS = 8;                            // staged in shared memory at a time
constexpr int EACH_KEY = (TOKENS * HEAD + THREADS - 1) / THREADS;
constexpr int EACH_V = TOKENS * VALUES / THREADS;

// In place: w becomes the decay, k and v what the formulas make of them, a becomes u * a. u: rows of heads * HEAD floats,
// written. A warp per head; grid: any that has rows * heads warps.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_7_prepare(float* w, float* k, float* v, float* a, const float* f, float* u, int stride, float* first, int first_row,
                   const float* k_k, const float* k_a, int rows, int heads) {
    pdl_launch();
    pdl_wait();
    const i64 number = ((i64)blockIdx.x * THREADS + threadIdx.x) / WARP;
    if (number >= (i64)rows * heads) return;
    const i64 row = number / heads;
    const int head = (int)(number % heads), lane = threadIdx.x % WARP;
    float squares = 0.0f;
    for (int i = lane; i < HEAD; i += WARP) {
        const float one = __fmul_rn(k[row * stride + head * HEAD + i], k_k[head * HEAD + i]);
        squares = fmaf(one, one, squares);
    }
    const float length = fmaxf(sqrtf(warp_sum(squares)), SHORTEST);
    for (int i = lane; i < HEAD; i += WARP) {
        const int column = head * HEAD + i;
        const i64 at = row * stride + column;
        const float own_a = logistic(a[at]), given = k[at], own_u = __fmul_rn(given, k_k[column]) / length;
        float* const of_first = first + row * first_row + column;
        if (f) v[at] = value_of(v[at], *of_first, f[at]);
        else *of_first = v[at];
        w[at] = decay_of(w[at]);
        k[at] = key_of(given, own_a, k_a[column]);
        a[at] = __fmul_rn(own_u, own_a);
        u[at] = own_u;
    }
}

struct Staged {
    float v[EACH_V], r[EACH_KEY], w[EACH_KEY], k[EACH_KEY], u[EACH_KEY], away[EACH_KEY];
};

// Rows of prompts, token after token, from what rwkv_7_prepare leaves; away: what it makes of a. grid (heads * PARTS, spans).
// out is y, which rwkv_7_finish turns into the result. While a block computes TOKENS tokens out of shared memory, the next
// ones are on their way. Lanes leave their parts of y in shared memory, where they are added for all tokens at once: nothing in
// the chain from token to token waits for y. A span without a past starts from zero and reads no memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_7_prompt(const float* r, const float* w, const float* k, const float* v, const float* u, const float* away,
                  int stride, float* memory, const PromptSpan* spans, float* out, int heads) {
    __shared__ __align__(16) float rs[TOKENS][PADDED];
    __shared__ __align__(16) float ws[TOKENS][PADDED];
    __shared__ __align__(16) float ks[TOKENS][PADDED];
    __shared__ __align__(16) float us[TOKENS][PADDED];
    __shared__ __align__(16) float aways[TOKENS][PADDED];
    __shared__ float vs[TOKENS][VALUES], ys[TOKENS][LANES][VALUES + 4];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES;
    const int head = blockIdx.x / PARTS, begin_value = blockIdx.x % PARTS * VALUES;
    for (int i = thread; i < TOKENS * PADDED; i += THREADS) {
        const int t = i / PADDED, key = i % PADDED;
        rs[t][key] = ws[t][key] = ks[t][key] = us[t][key] = aways[t][key] = 0.0f;
    }
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD;
    float m[EACH][KEYS];
    load_values<HEAD, LANES>(memory, span.read * size + head * HEAD, begin_value, GROUPS, mine, HEAD, span.n_past > 0, lane, m);
    auto load_inputs = [&](int begin, Staged& to) {
        const int n = min(TOKENS, span.n_rows - begin);
        const i64 row = span.row + begin;
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) {
            const int t = (i * THREADS + thread) / VALUES, value = begin_value + (i * THREADS + thread) % VALUES;
            to.v[i] = t < n && value < HEAD ? v[(row + t) * stride + head * HEAD + value] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH_KEY; ++i) {
            const int t = (i * THREADS + thread) / HEAD, key = (i * THREADS + thread) % HEAD;
            const i64 at = (row + t) * stride + head * HEAD + key;
            to.r[i] = t < n ? r[at] : 0.0f;
            to.w[i] = t < n ? w[at] : 0.0f;
            to.k[i] = t < n ? k[at] : 0.0f;
            to.u[i] = t < n ? u[at] : 0.0f;
            to.away[i] = t < n ? away[at] : 0.0f;
        }
    };
    Staged now, next;
    load_inputs(0, now);
    __syncthreads();  // what is padded is cleared
    for (int begin = 0; begin < span.n_rows; begin += TOKENS) {
        const int n = min(TOKENS, span.n_rows - begin);
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) vs[(i * THREADS + thread) / VALUES][(i * THREADS + thread) % VALUES] = now.v[i];
#pragma unroll
        for (int i = 0; i < EACH_KEY; ++i) {
            const int t = (i * THREADS + thread) / HEAD, key = (i * THREADS + thread) % HEAD;
            if (t >= TOKENS) continue;
            rs[t][key] = now.r[i], ws[t][key] = now.w[i], ks[t][key] = now.k[i];
            us[t][key] = now.u[i], aways[t][key] = now.away[i];
        }
        __syncthreads();
        if (begin + TOKENS < span.n_rows) load_inputs(begin + TOKENS, next);
#pragma unroll 2
        for (int t = 0; t < n; ++t) {
            float r_part[KEYS], w_part[KEYS], k_part[KEYS], u_part[KEYS], away_part[KEYS];
            load_part<PADDED, LANES, KEYS, true>(rs[t], lane, r_part);
            load_part<PADDED, LANES, KEYS, true>(ws[t], lane, w_part);
            load_part<PADDED, LANES, KEYS, true>(ks[t], lane, k_part);
            load_part<PADDED, LANES, KEYS, true>(us[t], lane, u_part);
            load_part<PADDED, LANES, KEYS, true>(aways[t], lane, away_part);
#pragma unroll
            for (int e = 0; e < EACH; ++e)
                remember(m[e], w_part, k_part, u_part, away_part, vs[t][e * GROUPS + mine]);
#pragma unroll
            for (int e = 0; e < EACH; ++e) ys[t][lane][e * GROUPS + mine] = sum_of_products<KEYS>(r_part, m[e]);
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

// y = (norm(y) + (sum of r * k * r_k) v) * gate of each head, in place; k and v as rwkv_7_prepare leaves them. A warp per
// head; grid: any that has rows * heads warps.
extern "C" __global__ void __launch_bounds__(THREADS)
    rwkv_7_finish(float* y, const float* r, const float* k, const float* v, const float* gate, int stride, const float* r_k,
                  const float* norm, const float* bias, float eps, int rows, int heads) {
    pdl_launch();
    pdl_wait();
    const i64 number = ((i64)blockIdx.x * THREADS + threadIdx.x) / WARP;
    if (number >= (i64)rows * heads) return;
    const i64 row = number / heads, at = row * stride;
    const int first = (int)(number % heads) * HEAD, lane = threadIdx.x % WARP;
    float* const from = y + number * HEAD;
    float bonus = 0.0f;
    for (int i = lane; i < HEAD; i += WARP)
        bonus = fmaf(__fmul_rn(k[at + first + i], r[at + first + i]), r_k[first + i], bonus);
    bonus = warp_sum(bonus);
    HeadNorm of = {0.0f, 1.0f};
    if (norm) of = norm_of_head(from, HEAD, lane, eps);
    for (int i = lane; i < HEAD; i += WARP) {
        float value = (from[i] - of.mean) * of.factor;
        if (norm) value = fmaf(value, norm[first + i], bias[first + i]);
        value = fmaf(v[at + first + i], bonus, value);
        from[i] = gate ? value * gate[at + first + i] : value;
    }
}
