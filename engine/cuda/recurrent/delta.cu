// Gated delta rules behind the first products of a layer. Of each head, a memory M of HEAD keys by HEAD values, for each token:
//     M = decay * M;  M += k (x) beta * (v - k . M);  y = q . M / sqrt(HEAD);  out = norm(y) * gate
// where q, k and v are silu of the convolution, q and k divided by sqrt(sum of squares + UNIT_EPSILON), or where that is not
// above 0 eps, beta = sigmoid(beta). Decays are exp(a * softplus(steps + dt_bias)), or with a FLOOR below 0
// exp(FLOOR * sigmoid(a * (steps + dt_bias))); KIMI 0: one per head, KIMI 1: one per key. OPEN 1: the gate is sigmoid, else silu.
//
// mixed: rows of mixed_row floats that begin with the inputs of the convolution: q (key_heads * HEAD), k (the same), v
// (heads * HEAD). gate: rows of heads * HEAD floats, beta: of heads, steps: of heads, or (KIMI) heads * HEAD; each with its own
// row stride. weight (channels, D_CONV); dt_bias (heads), or (KIMI) heads * HEAD; a (heads); norm (HEAD). past: rows of
// (channels, D_CONV - 1), the convolution's last inputs. state: rows of (heads, HEAD values, HEAD keys): M with values
// outermost. out (rows, heads * HEAD). Value head h reads key head h / (heads / key_heads) where `grouped`, else h mod key_heads.
// LANES lanes hold the keys of a value, KEYS each. Prompts are computed token after token by the same operations however
// they are cut.

constexpr int LANES = 8;
constexpr int KEYS = floats_of_a_lane(HEAD, LANES);
constexpr int PADDED = KEYS * LANES;
static_assert(HEAD >= 1 && HEAD <= 128, "a lane holds at most 16 keys");

DEVICE int key_head_of(int head, int heads, int key_heads, int grouped) {
    return grouped ? head / (heads / key_heads) : head % key_heads;
}

// What a row's steps become for a head or a key.
DEVICE float decay_of(float steps, float dt_bias, float rate) { return decay_of_step(steps + dt_bias, rate, FLOOR); }
DEVICE float unit_epsilon(float eps) { return UNIT_EPSILON > 0.0f ? UNIT_EPSILON : eps; }

// Sum of squares of HEAD floats, in every lane of the warp.
DEVICE float squares(const float* x, int lane) {
    float sum = 0.0f;
    for (int i = lane; i < HEAD; i += WARP) sum = fmaf(x[i], x[i], sum);
    return warp_sum(sum);
}

// ---- the rule, of one value and the keys of a lane. q and k are still to be multiplied by factors -------------------
// decay: of the head, or (KIMI) unused, with those of the keys in decays.
DEVICE void decay_memory(float* m, const float* decays, float decay) {
#pragma unroll
    for (int i = 0; i < KEYS; ++i) m[i] = __fmul_rn(m[i], KIMI ? decays[i] : decay);
}

// What k brings into a memory, in every lane of the value.
DEVICE float change_of(const float* m, const float* k, float v, float beta, float of_k) {
    const float known = __fmul_rn(of_k, dot_parts<LANES, KEYS>(k, m));
    return __fmul_rn(__fmul_rn(beta, v - known), of_k);
}

DEVICE void add_change(float* m, const float* k, float change) {
#pragma unroll
    for (int i = 0; i < KEYS; ++i) m[i] = fmaf(k[i], change, m[i]);
}

DEVICE float opened(float gate) { return OPEN ? logistic(gate) : silu(gate); }

// ---- decode steps ------------------------------------------------------------------------------------------------
constexpr int DECODE_THREADS = 512;
constexpr int AT_ONCE = DECODE_THREADS / LANES;  // values
constexpr int TURNS = (HEAD + AT_ONCE - 1) / AT_ONCE;
static_assert(3 * HEAD <= DECODE_THREADS, "a thread convolves one channel");

// One new token of each slot: row b is slot b. grid (heads, rows). A row with position -1 is left alone; at position 0 states
// are zero. Positions, offsets and states in front are read before the wait: the first kernel of a step must not be launched
// early. Heads that share q and k convolve them each for itself; one of them keeps the inputs.
extern "C" __global__ void __launch_bounds__(DECODE_THREADS)
    delta_decode(const float* mixed, int mixed_row, const float* weight, const float* gate, int gate_row, const float* beta,
                 int beta_row, const float* steps, int steps_row, const float* dt_bias, const float* a, const float* norm,
                 float eps, float* past, float* state, int places, const int* positions, const int* offsets, float* out,
                 int heads, int key_heads, int grouped) {
    __shared__ __align__(16) float parts[3][PADDED];  // q, k, v
    __shared__ __align__(16) float decays[PADDED];
    __shared__ float ys[HEAD], factors[2], scratch[32];
    pdl_launch();
    const int row = blockIdx.y, position = positions[row], thread = threadIdx.x, lane = thread % LANES;
    if (position < 0) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int head = blockIdx.x, key_head = key_head_of(head, heads, key_heads, grouped), offset = offsets[row];
    const int keys = key_heads * HEAD, channels = 2 * keys + heads * HEAD;
    const i64 read = (i64)row * places + place_of(position - 1, offset, places);
    const i64 write = (i64)row * places + place_of(position, offset, places);
    const bool keeps = grouped ? head % (heads / key_heads) == 0 : head < key_heads;
    float m[TURNS][KEYS];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int value = turn * AT_ONCE + thread / LANES;
        if (position > 0 && value < HEAD) {
            load_part<HEAD, LANES, KEYS, true>(state + ((read * heads + head) * HEAD + value) * HEAD, lane, m[turn]);
        } else {
            clear_part<KEYS>(m[turn]);
        }
    }
    const int part = thread / HEAD, in_part = thread % HEAD;  // the channel that this thread convolves
    const int channel = part == 2 ? 2 * keys + head * HEAD + in_part : part * keys + key_head * HEAD + in_part;
    Channels<1, D_CONV> input;
    if (part < 3) {
        input.load_weights(weight, nullptr, channel);
        if (position > 0) {
            input.load_state(past + read * channels * (D_CONV - 1), channel);
        } else {
            input.forget();
        }
    }
    for (int i = HEAD + thread; i < PADDED; i += DECODE_THREADS) parts[0][i] = parts[1][i] = decays[i] = 0.0f;
    const float rate = a[head];
    const int first_step = KIMI ? head * HEAD : head;  // a head's steps
    pdl_wait();
    if (part < 3) {
        float sum;
        input.step(mixed + (i64)row * mixed_row + channel, &sum);
        parts[part][in_part] = silu(sum);
        if (part == 2 || keeps) input.store_state(past + write * channels * (D_CONV - 1), channel);
    }
    const float* const of_steps = steps + (i64)row * steps_row + first_step;
    if (KIMI && thread < HEAD) decays[thread] = decay_of(of_steps[thread], dt_bias[first_step + thread], rate);
    const float decay = KIMI ? 0.0f : decay_of(of_steps[0], dt_bias[first_step], rate);
    const float share = logistic(beta[(i64)row * beta_row + head]);
    __syncthreads();
    if (thread < 2 * WARP) {
        const float sum = squares(parts[thread / WARP], thread % WARP) + unit_epsilon(eps);
        if (thread % WARP == 0) factors[thread / WARP] = 1.0f / sqrtf(thread ? sum : __fmul_rn(sum, (float)HEAD));
    }
    __syncthreads();
    float q[KEYS], k[KEYS], of_keys[KEYS];
    load_part<PADDED, LANES, KEYS, true>(parts[0], lane, q);
    load_part<PADDED, LANES, KEYS, true>(parts[1], lane, k);
    if (KIMI) load_part<PADDED, LANES, KEYS, true>(decays, lane, of_keys);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int value = turn * AT_ONCE + thread / LANES;
        const float v = value < HEAD ? parts[2][value] : 0.0f;
        decay_memory(m[turn], of_keys, decay);
        add_change(m[turn], k, change_of(m[turn], k, v, share, factors[1]));
        const float y = __fmul_rn(factors[0], dot_parts<LANES, KEYS>(q, m[turn]));
        if (value >= HEAD) continue;
        store_part<HEAD, LANES, KEYS>(state + ((write * heads + head) * HEAD + value) * HEAD, lane, m[turn]);
        if (lane == 0) ys[value] = y;
    }
    __syncthreads();
    const float y = thread < HEAD ? ys[thread] : 0.0f;
    const float factor = 1.0f / sqrtf(block_sum(__fmul_rn(y, y), scratch) / HEAD + eps);
    if (thread >= HEAD) return;
    const int column = head * HEAD + thread;
    out[(i64)row * heads * HEAD + column] = y * factor * norm[thread] * opened(gate[(i64)row * gate_row + column]);
}

// ---- prompts -----------------------------------------------------------------------------------------------------
constexpr int THREADS = 128;
constexpr int EACH = 2;  // values of a lane: two chains of operations hide each other's waits, and q and k are read once for both
constexpr int GROUPS = THREADS / LANES;               // of lanes
constexpr int VALUES = GROUPS * EACH;                 // of a block
constexpr int BLOCKS = (HEAD + VALUES - 1) / VALUES;  // of a head; delta.py has the same number
constexpr int TOKENS = 8;                             // staged in shared memory at a time
constexpr int EACH_QK = (TOKENS * 2 * HEAD + THREADS - 1) / THREADS;
constexpr int EACH_V = TOKENS * VALUES / THREADS;
constexpr int EACH_DECAY = KIMI ? (TOKENS * HEAD + THREADS - 1) / THREADS : 1;

struct Staged {
    float v[EACH_V], beta, qk[EACH_QK], steps[EACH_DECAY];
};

// Rows of prompts, token after token. grid (heads * BLOCKS, spans). convolved (rows, channels): silu of the convolution. out is
// y, which delta_finish turns into the result. While a block computes TOKENS tokens out of shared memory, the inputs of the
// next ones are on their way. Lanes leave their parts of y in shared memory, where they are added for all tokens at once:
// nothing in the chain from token to token waits for y. A span without a past starts from zero and reads no state.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_prompt(const float* convolved, const float* beta, int beta_row, const float* steps, int steps_row,
                 const float* dt_bias, const float* a, float eps, float* state, const PromptSpan* spans, float* out, int heads,
                 int key_heads, int grouped) {
    __shared__ __align__(16) float qs[TOKENS][PADDED];
    __shared__ __align__(16) float ks[TOKENS][PADDED];
    __shared__ __align__(16) float decays[TOKENS][KIMI ? PADDED : 4];
    __shared__ float vs[TOKENS][VALUES], ys[TOKENS][LANES][VALUES + 4];
    __shared__ float betas[TOKENS], factors[TOKENS][2];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES;
    const int head = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * VALUES;
    const int key_head = key_head_of(head, heads, key_heads, grouped);
    const int keys = key_heads * HEAD, channels = 2 * keys + heads * HEAD, first_step = KIMI ? head * HEAD : head;
    const float rate = a[head];
    for (int i = thread; i < TOKENS * PADDED; i += THREADS) {
        qs[i / PADDED][i % PADDED] = ks[i / PADDED][i % PADDED] = 0.0f;
        if (KIMI) decays[i / PADDED][i % PADDED] = 0.0f;
    }
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)heads * HEAD;
    float m[EACH][KEYS];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int value = first + e * GROUPS + mine;
        if (span.n_past > 0 && value < HEAD) {
            load_part<HEAD, LANES, KEYS, true>(state + (span.read * size + head * HEAD + value) * HEAD, lane, m[e]);
        } else {
            clear_part<KEYS>(m[e]);
        }
    }
    auto load_inputs = [&](int begin, Staged& to) {
        const int n = min(TOKENS, span.n_rows - begin);
        const i64 row = span.row + begin;
        to.beta = thread < n ? beta[(row + thread) * beta_row + head] : 0.0f;
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) {
            const int t = (i * THREADS + thread) / VALUES, value = first + (i * THREADS + thread) % VALUES;
            to.v[i] = t < n && value < HEAD ? convolved[(row + t) * channels + 2 * keys + head * HEAD + value] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH_QK; ++i) {
            const int t = (i * THREADS + thread) / (2 * HEAD), k = (i * THREADS + thread) % (2 * HEAD);
            const int from = k < HEAD ? key_head * HEAD + k : keys + key_head * HEAD + k - HEAD;
            to.qk[i] = t < n ? convolved[(row + t) * channels + from] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH_DECAY; ++i) {
            const int number = i * THREADS + thread, t = KIMI ? number / HEAD : number, k = KIMI ? number % HEAD : 0;
            to.steps[i] = t < n ? steps[(row + t) * steps_row + first_step + k] : 0.0f;
        }
    };
    Staged now, next;
    load_inputs(0, now);
    __syncthreads();  // what is padded is cleared
    for (int begin = 0; begin < span.n_rows; begin += TOKENS) {
        const int n = min(TOKENS, span.n_rows - begin);
        if (thread < TOKENS) betas[thread] = logistic(now.beta);
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) vs[(i * THREADS + thread) / VALUES][(i * THREADS + thread) % VALUES] = now.v[i];
#pragma unroll
        for (int i = 0; i < EACH_QK; ++i) {
            const int t = (i * THREADS + thread) / (2 * HEAD), k = (i * THREADS + thread) % (2 * HEAD);
            if (t < TOKENS) (k < HEAD ? qs[t][k] : ks[t][k - HEAD]) = now.qk[i];
        }
#pragma unroll
        for (int i = 0; i < EACH_DECAY; ++i) {
            const int number = i * THREADS + thread, t = KIMI ? number / HEAD : number, k = KIMI ? number % HEAD : 0;
            if (t < TOKENS) decays[t][k] = decay_of(now.steps[i], dt_bias[first_step + k], rate);
        }
        __syncthreads();
        if (begin + TOKENS < span.n_rows) load_inputs(begin + TOKENS, next);
#pragma unroll
        for (int i = 0; i < 2 * TOKENS / (THREADS / WARP); ++i) {
            const int number = i * (THREADS / WARP) + thread / WARP, t = number / 2;
            const float sum = squares(number % 2 ? ks[t] : qs[t], thread % WARP) + unit_epsilon(eps);
            if (thread % WARP == 0) factors[t][number % 2] = 1.0f / sqrtf(number % 2 ? sum : __fmul_rn(sum, (float)HEAD));
        }
        __syncthreads();
#pragma unroll 2
        for (int t = 0; t < n; ++t) {
            float q[KEYS], k[KEYS], of_keys[KEYS];
            load_part<PADDED, LANES, KEYS, true>(qs[t], lane, q);
            load_part<PADDED, LANES, KEYS, true>(ks[t], lane, k);
            if (KIMI) load_part<PADDED, LANES, KEYS, true>(decays[t], lane, of_keys);
            float changes[EACH];
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                decay_memory(m[e], of_keys, decays[t][0]);
                changes[e] = change_of(m[e], k, vs[t][e * GROUPS + mine], betas[t], factors[t][1]);
            }
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                add_change(m[e], k, changes[e]);
                ys[t][lane][e * GROUPS + mine] = sum_of_products<KEYS>(q, m[e]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH_V; ++i) {
            const int t = (i * THREADS + thread) / VALUES, at = (i * THREADS + thread) % VALUES;
            if (t >= n || first + at >= HEAD) continue;
            const float sum = sum_of_left(ys[t], at);
            out[(span.row + begin + t) * size + head * HEAD + first + at] = __fmul_rn(factors[t][0], sum);
        }
        now = next;
    }
    store_values<HEAD, LANES>(state, span.write * size + head * HEAD, first, GROUPS, mine, HEAD, lane, m);
}

// y = norm(y) * gate of each head, in place. A warp per head; grid: any that has rows * heads warps.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_finish(float* y, const float* gate, int gate_row, const float* norm, float eps, int rows, int heads) {
    pdl_launch();
    pdl_wait();
    const i64 number = ((i64)blockIdx.x * THREADS + threadIdx.x) / WARP;
    if (number >= (i64)rows * heads) return;
    const i64 row = number / heads;
    const int head = (int)(number % heads), lane = threadIdx.x % WARP;
    float* const from = y + number * HEAD;
    const float* const gates = gate + row * gate_row + head * HEAD;
    const float factor = 1.0f / sqrtf(squares(from, lane) / HEAD + eps);
    for (int i = lane; i < HEAD; i += WARP) from[i] = from[i] * factor * norm[i] * opened(gates[i]);
}
