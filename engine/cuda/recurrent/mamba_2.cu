// The state space of a Mamba 2 layer behind its first product. Of each head and its HEAD channels of D_STATE states h, for
// each token:
//     step = softplus(dt + dt_bias);  h = exp(step * a) * h + step * x * B;  out = (C . h + d * x) * silu(z)
// where x, B and C are silu of the convolution; heads / groups heads share a B and a C.
//
// mixed: rows of mixed_row floats: z (heads * HEAD), then the inputs of the convolution: x (heads * HEAD), B (groups * D_STATE),
// C (groups * D_STATE), then dt (heads). weight (channels, D_CONV), bias (channels) or null: of the convolution. dt_bias, a, d
// (heads). past: rows of (channels, D_CONV - 1), the convolution's last inputs. state: rows of (heads, HEAD, D_STATE).
// out (rows, heads * HEAD).
// LANES lanes hold the states of a channel, STATES each. Prompts are computed token after token by the same operations
// however they are cut.

constexpr int THREADS = 256;
constexpr int LANES = 8;
constexpr int STATES = floats_of_a_lane(D_STATE, LANES);
constexpr int PADDED = STATES * LANES;
constexpr int CHANNELS = THREADS / LANES;  // that a block computes at a time
static_assert(D_STATE >= 1 && D_STATE <= 256 && HEAD >= 1, "a lane holds at most 32 states");

// h of the next token; returns C . h, in every lane of the channel.
DEVICE float scan_token(float* h, float decay, float step_x, const float* b, const float* c) {
#pragma unroll
    for (int i = 0; i < STATES; ++i) h[i] = fmaf(h[i], decay, __fmul_rn(step_x, b[i]));
    return dot_parts<LANES, STATES>(c, h);
}

// ---- decode steps ------------------------------------------------------------------------------------------------
constexpr int TURNS = HEAD > CHANNELS ? 2 : 1;        // channels of a lane
constexpr int SLICE = TURNS * CHANNELS;               // of a head, that a block computes
constexpr int SLICES = (HEAD + SLICE - 1) / SLICE;    // mamba_2.py has the same number
constexpr int INPUTS = SLICE + 2 * D_STATE;           // channels that a block convolves: its x, B and C
constexpr int EACH = (INPUTS + THREADS - 1) / THREADS;

// One new token of each slot: row b is slot b. grid (heads * SLICES, rows). A row with position -1 is left alone; at position 0
// states are zero. Positions, offsets and states in front are read before the wait: the first kernel of a step must
// not be launched early. Heads that share B and C convolve them each for itself; one of them keeps the inputs.
extern "C" __global__ void __launch_bounds__(THREADS)
    mamba_2_decode(const float* mixed, int mixed_row, const float* weight, const float* bias, const float* dt_bias,
                   const float* a, const float* d, float* past, float* state, int places, const int* positions,
                   const int* offsets, float* out, int heads, int groups) {
    __shared__ __align__(16) float bs[PADDED];
    __shared__ __align__(16) float cs[PADDED];
    __shared__ float xs[SLICE];
    pdl_launch();
    const int row = blockIdx.y, position = positions[row], thread = threadIdx.x, lane = thread % LANES;
    if (position < 0) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * SLICE, sharing = heads / groups, group = head / sharing;
    const int inner = heads * HEAD, channels = inner + 2 * groups * D_STATE, offset = offsets[row];
    const i64 read = (i64)row * places + place_of(position - 1, offset, places);
    const i64 write = (i64)row * places + place_of(position, offset, places);
    const bool keeps = head % sharing == 0 && first == 0;
    // Number i of a block's inputs as a channel of the convolution; -1 for none.
    auto channel_of = [&](int i) {
        if (i < SLICE) return first + i < HEAD ? head * HEAD + first + i : -1;
        if (i >= INPUTS) return -1;
        const int n = i - SLICE;
        return inner + (n < D_STATE ? group * D_STATE + n : (groups + group) * D_STATE + n - D_STATE);
    };
    float h[TURNS][STATES];
    Channels<1, D_CONV> inputs[EACH];
    for (int i = thread; i < PADDED; i += THREADS) bs[i] = cs[i] = 0.0f;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int at = first + turn * CHANNELS + thread / LANES;
        if (position > 0 && at < HEAD) {
            load_part<D_STATE, LANES, STATES, true>(state + ((read * heads + head) * HEAD + at) * D_STATE, lane, h[turn]);
        } else {
            clear_part<STATES>(h[turn]);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int channel = channel_of(i * THREADS + thread);
        if (channel < 0) continue;
        inputs[i].load_weights(weight, bias, channel);
        if (position > 0) {
            inputs[i].load_state(past + read * channels * (D_CONV - 1), channel);
        } else {
            inputs[i].forget();
        }
    }
    const float of_step = dt_bias[head], rate = a[head], skip = d[head];
    pdl_wait();
    __syncthreads();  // bs and cs are cleared
    const float* const given = mixed + (i64)row * mixed_row;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int number = i * THREADS + thread, channel = channel_of(number), n = number - SLICE;
        if (channel < 0) continue;
        float sum;
        inputs[i].step(given + inner + channel, &sum);
        (n < 0 ? xs[number] : n < D_STATE ? bs[n] : cs[n - D_STATE]) = silu(sum);
        if (n < 0 || keeps) inputs[i].store_state(past + write * channels * (D_CONV - 1), channel);
    }
    const float step = softplus(given[inner + channels + head] + of_step), decay = expf(__fmul_rn(step, rate));
    __syncthreads();
    float b[STATES], c[STATES];
    load_part<PADDED, LANES, STATES, true>(bs, lane, b);
    load_part<PADDED, LANES, STATES, true>(cs, lane, c);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int in_slice = turn * CHANNELS + thread / LANES, at = first + in_slice;
        const float x = at < HEAD ? xs[in_slice] : 0.0f;
        const float sum = scan_token(h[turn], decay, __fmul_rn(step, x), b, c);
        if (at >= HEAD) continue;
        store_part<D_STATE, LANES, STATES>(state + ((write * heads + head) * HEAD + at) * D_STATE, lane, h[turn]);
        const int column = head * HEAD + at;
        if (lane == 0) out[(i64)row * inner + column] = gated(sum, skip, x, given[column]);
    }
}

// ---- prompts -----------------------------------------------------------------------------------------------------
constexpr int TOKENS = 8;  // staged in shared memory at a time: a thread stages one x and one z
constexpr int PARTS = (HEAD + CHANNELS - 1) / CHANNELS;  // blocks of a head; mamba_2.py has the same number
constexpr int EACH_BC = (TOKENS * 2 * D_STATE + THREADS - 1) / THREADS;
static_assert(TOKENS * CHANNELS == THREADS, "one x and one z for each thread");

struct Staged {
    float x, z, dt, bc[EACH_BC];
};

// Rows of prompts, token after token. grid (heads * PARTS, spans). convolved (rows, channels): silu of the convolution. While
// a block scans TOKENS tokens out of shared memory, the inputs of the next ones are on their way. A span without a past
// starts from zero and reads no state.
extern "C" __global__ void __launch_bounds__(THREADS)
    mamba_2_prompt(const float* mixed, int mixed_row, const float* convolved, const float* dt_bias, const float* a,
                   const float* d, float* state, const PromptSpan* spans, float* out, int heads, int groups) {
    __shared__ __align__(16) float bs[TOKENS][PADDED];
    __shared__ __align__(16) float cs[TOKENS][PADDED];
    __shared__ float xs[TOKENS][CHANNELS];  // times the step
    __shared__ float sums[TOKENS][CHANNELS];
    __shared__ float decays[TOKENS], steps[TOKENS];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES;
    const int head = blockIdx.x / PARTS, first = blockIdx.x % PARTS * CHANNELS, group = head / (heads / groups);
    const int inner = heads * HEAD, channels = inner + 2 * groups * D_STATE;
    const float of_step = dt_bias[head], rate = a[head], skip = d[head];
    for (int i = thread; i < TOKENS * PADDED; i += THREADS) bs[i / PADDED][i % PADDED] = cs[i / PADDED][i % PADDED] = 0.0f;
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const bool inside = first + mine < HEAD;
    const i64 at = head * HEAD + first + mine;
    float h[STATES];
    if (span.n_past > 0 && inside) {
        load_part<D_STATE, LANES, STATES, true>(state + ((i64)span.read * inner + at) * D_STATE, lane, h);
    } else {
        clear_part<STATES>(h);
    }
    const int token = thread / CHANNELS, column = first + thread % CHANNELS;  // whose x and z this thread stages
    auto load_inputs = [&](int begin, Staged& to) {
        const int n = min(TOKENS, span.n_rows - begin);
        const i64 row = span.row + begin;
        const bool there = token < n && column < HEAD;
        to.x = there ? convolved[(row + token) * channels + head * HEAD + column] : 0.0f;
        to.z = there ? mixed[(row + token) * mixed_row + head * HEAD + column] : 0.0f;
        to.dt = thread < n ? mixed[(row + thread) * mixed_row + inner + channels + head] : 0.0f;
#pragma unroll
        for (int i = 0; i < EACH_BC; ++i) {
            const int t = (i * THREADS + thread) / (2 * D_STATE), k = (i * THREADS + thread) % (2 * D_STATE);
            const int from = k < D_STATE ? group * D_STATE + k : (groups + group) * D_STATE + k - D_STATE;
            to.bc[i] = t < n ? convolved[(row + t) * channels + inner + from] : 0.0f;
        }
    };
    Staged now, next;
    load_inputs(0, now);
    __syncthreads();  // bs and cs are cleared
    for (int begin = 0; begin < span.n_rows; begin += TOKENS) {
        const int n = min(TOKENS, span.n_rows - begin);
        if (thread < TOKENS) {
            steps[thread] = softplus(now.dt + of_step);
            decays[thread] = expf(__fmul_rn(steps[thread], rate));
        }
        xs[token][thread % CHANNELS] = now.x;
#pragma unroll
        for (int i = 0; i < EACH_BC; ++i) {
            const int t = (i * THREADS + thread) / (2 * D_STATE), k = (i * THREADS + thread) % (2 * D_STATE);
            if (t < TOKENS) (k < D_STATE ? bs[t][k] : cs[t][k - D_STATE]) = now.bc[i];
        }
        __syncthreads();
        if (begin + TOKENS < span.n_rows) load_inputs(begin + TOKENS, next);
#pragma unroll 2
        for (int t = 0; t < n; ++t) {
            float b[STATES], c[STATES];
            load_part<PADDED, LANES, STATES, true>(bs[t], lane, b);
            load_part<PADDED, LANES, STATES, true>(cs[t], lane, c);
            const float sum = scan_token(h, decays[t], __fmul_rn(steps[t], xs[t][mine]), b, c);
            if (lane == 0) sums[t][mine] = sum;
        }
        __syncthreads();
        if (token < n && column < HEAD)
            out[(i64)(span.row + begin + token) * inner + head * HEAD + column] =
                gated(sums[token][thread % CHANNELS], skip, now.x, now.z);
        now = next;
    }
    if (inside) store_part<D_STATE, LANES, STATES>(state + ((i64)span.write * inner + at) * D_STATE, lane, h);
}
