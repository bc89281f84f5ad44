// The selective scan of a Mamba layer. Of each channel and its D_STATE states h, for each token:
//     step = softplus(dt);  h = exp(step * A) * h + step * x * B;  out = (C . h + D * x) * silu(z)
//
// dt, x: (rows, d_inner). bc: B of a row, C directly behind it; bc_row floats from row to row. xz: rows of 2 * d_inner
// floats, z the last d_inner. a (d_inner, D_STATE), d (d_inner). state: rows of (d_inner, D_STATE). out (rows, d_inner) may
// be dt, whose elements the lanes that write them have read before. VECTORS: B and C of each row are aligned to 16 bytes.
// A lane holds STATES states of a channel, LANES lanes a channel, CHANNELS channels a block. The order of a token's
// operations is the same in both kernels, so how a prompt is cut does not change a bit.

constexpr int THREADS = 128;

constexpr int power_of_two(int n) {
    int power = 4;
    while (power < n) power *= 2;
    return power;
}

constexpr int PADDED = power_of_two(D_STATE);
constexpr int STATES = PADDED <= 128 ? 4 : PADDED / 32;
constexpr int LANES = PADDED / STATES;
constexpr int CHANNELS = THREADS / LANES;
constexpr float LOG2_E = 1.44269504f;
static_assert(D_STATE >= 1 && D_STATE <= 256, "a warp holds all states of a channel");

template <bool ALIGNED>
DEVICE void load_states(const float* p, int lane, float* h) { load_part<D_STATE, LANES, STATES, ALIGNED>(p, lane, h); }

// A in powers of two: one multiplication per token less.
DEVICE void load_decays(const float* a, int lane, float* decay) {
    load_states<true>(a, lane, decay);
#pragma unroll
    for (int i = 0; i < STATES; ++i) decay[i] *= LOG2_E;
}

// h of the next token; returns C . h, in every lane of the channel.
DEVICE float scan_token(float* h, const float* decay, float step, float step_x, const float* b, const float* c) {
#pragma unroll
    for (int i = 0; i < STATES; ++i) h[i] = fmaf(h[i], exp2f(__fmul_rn(step, decay[i])), __fmul_rn(step_x, b[i]));
    return dot_parts<LANES, STATES>(c, h);
}

// One new token of each slot: row b is slot b. grid (blocks of channels, any up to rows): a block takes every gridDim.y-th
// row and keeps A. A row with position -1 is left alone; at position 0 the state in front is zero. Positions, offsets and
// the first row's state are read before the wait: the first kernel of a step must not be launched early.
extern "C" __global__ void __launch_bounds__(THREADS)
    scan_decode(const float* dt, const float* x, const float* bc, int bc_row, const float* xz, const float* a, const float* d,
                float* state, int places, const int* positions, const int* offsets, int rows, float* out, int d_inner) {
    pdl_launch();
    const int lane = threadIdx.x % LANES, at = blockIdx.x * CHANNELS + threadIdx.x / LANES;
    const bool inside = at < d_inner;
    const int channel = min(at, d_inner - 1);  // the others compute along: lanes exchange values
    const i64 size = (i64)d_inner * D_STATE;
    float* const states = state + (i64)channel * D_STATE;
    float h[STATES], next[STATES], decay[STATES], b[STATES], c[STATES];
    auto load_row = [&](int row, int position, float* to) {
        if (position > 0) {
            const int place = place_of(position - 1, offsets[row], places);
            load_states<true>(states + ((i64)row * places + place) * size, lane, to);
        } else {
            clear_part<STATES>(to);
        }
    };
    load_decays(a + (i64)channel * D_STATE, lane, decay);
    const float skip = d[channel];
    int row = blockIdx.y, position = positions[row];
    load_row(row, position, h);
    pdl_wait();
    while (row < rows) {
        const int next_row = row + gridDim.y, next_position = next_row < rows ? positions[next_row] : -1;
        load_row(next_row, next_position, next);
        if (position >= 0) {
            const i64 element = (i64)row * d_inner + channel;
            const float step = softplus(dt[element]), input = x[element];
            load_states<VECTORS>(bc + (i64)row * bc_row, lane, b);
            load_states<VECTORS>(bc + (i64)row * bc_row + D_STATE, lane, c);
            const float sum = scan_token(h, decay, step, __fmul_rn(step, input), b, c);
            if (inside) {
                const int place = place_of(position, offsets[row], places);
                store_part<D_STATE, LANES, STATES>(states + ((i64)row * places + place) * size, lane, h);
                if (lane == 0) out[element] = gated(sum, skip, input, xz[element + (i64)(row + 1) * d_inner]);
            }
        }
#pragma unroll
        for (int i = 0; i < STATES; ++i) h[i] = next[i];
        row = next_row, position = next_position;
    }
}

// ---- prompts -------------------------------------------------------------------------------------------------
constexpr int TOKENS = D_STATE <= 16 ? 16 : D_STATE <= 64 ? 8 : 4;  // staged in shared memory at a time
constexpr int EACH = (TOKENS * CHANNELS + THREADS - 1) / THREADS;   // values of a channel and token that a thread stages
constexpr int EACH_BC = (TOKENS * 2 * D_STATE + THREADS - 1) / THREADS;

// What a thread stages of TOKENS tokens: number i * THREADS + thread of (token, channel) and of (token, B and C).
struct Staged {
    float dt[EACH], x[EACH], z[EACH], bc[EACH_BC];
};

// Rows of prompts, token after token. grid (blocks of channels, spans). While a block scans TOKENS tokens out of shared
// memory, the inputs of the next ones are on their way. A span without a past starts from zero and reads no state.
extern "C" __global__ void __launch_bounds__(THREADS)
    scan_prompt(const float* dt, const float* x, const float* bc, int bc_row, const float* xz, const float* a, const float* d,
                float* state, const PromptSpan* spans, float* out, int d_inner) {
    __shared__ float2 steps[TOKENS][CHANNELS];  // softplus(dt), and that times x
    __shared__ __align__(16) float bs[TOKENS][PADDED];
    __shared__ __align__(16) float cs[TOKENS][PADDED];
    __shared__ float sums[TOKENS][CHANNELS];  // C . h
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES, first_channel = blockIdx.x * CHANNELS;
    const bool inside = first_channel + mine < d_inner;
    const int channel = min(first_channel + mine, d_inner - 1);
    float h[STATES], decay[STATES];
    load_decays(a + (i64)channel * D_STATE, lane, decay);
    if constexpr (PADDED > D_STATE) {
        for (int i = thread; i < TOKENS * PADDED; i += THREADS)
            if (i % PADDED >= D_STATE) bs[i / PADDED][i % PADDED] = cs[i / PADDED][i % PADDED] = 0.0f;
    }
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const i64 size = (i64)d_inner * D_STATE;
    float* const states = state + (i64)channel * D_STATE;
    if (span.n_past > 0) {
        load_states<true>(states + span.read * size, lane, h);
    } else {
        clear_part<STATES>(h);
    }
    Staged now, next;
    auto load_inputs = [&](int first, Staged& to) {
        const int n = min(TOKENS, span.n_rows - first);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = (i * THREADS + thread) / CHANNELS, at = first_channel + (i * THREADS + thread) % CHANNELS;
            const bool there = t < n && at < d_inner;
            const i64 row = span.row + first + t, element = row * d_inner + at;
            to.dt[i] = there ? dt[element] : 0.0f;
            to.x[i] = there ? x[element] : 0.0f;
            to.z[i] = there ? xz[element + (row + 1) * d_inner] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH_BC; ++i) {
            const int t = (i * THREADS + thread) / (2 * D_STATE), at = (i * THREADS + thread) % (2 * D_STATE);
            to.bc[i] = t < n ? bc[(i64)(span.row + first + t) * bc_row + at] : 0.0f;
        }
    };
    load_inputs(0, now);
    for (int first = 0; first < span.n_rows; first += TOKENS) {
        const int n = min(TOKENS, span.n_rows - first);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = (i * THREADS + thread) / CHANNELS, at = (i * THREADS + thread) % CHANNELS;
            const float step = softplus(now.dt[i]);
            if (t < TOKENS) steps[t][at] = make_float2(step, __fmul_rn(step, now.x[i]));
        }
#pragma unroll
        for (int i = 0; i < EACH_BC; ++i) {
            const int t = (i * THREADS + thread) / (2 * D_STATE), at = (i * THREADS + thread) % (2 * D_STATE);
            if (t < TOKENS) (at < D_STATE ? bs[t][at] : cs[t][at - D_STATE]) = now.bc[i];
        }
        __syncthreads();
        if (first + TOKENS < span.n_rows) load_inputs(first + TOKENS, next);
#pragma unroll 4
        for (int t = 0; t < n; ++t) {
            float b[STATES], c[STATES];
#pragma unroll
            for (int i = 0; i < STATES; i += 4) {
                const float4 four = *(const float4*)&bs[t][i * LANES + lane * 4];
                const float4 more = *(const float4*)&cs[t][i * LANES + lane * 4];
                b[i] = four.x, b[i + 1] = four.y, b[i + 2] = four.z, b[i + 3] = four.w;
                c[i] = more.x, c[i + 1] = more.y, c[i + 2] = more.z, c[i + 3] = more.w;
            }
            const float2 step = steps[t][mine];
            const float sum = scan_token(h, decay, step.x, step.y, b, c);
            if (lane == 0) sums[t][mine] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = (i * THREADS + thread) / CHANNELS, at = (i * THREADS + thread) % CHANNELS;
            if (t < n && first_channel + at < d_inner) {
                const i64 element = (i64)(span.row + first + t) * d_inner + first_channel + at;
                out[element] = gated(sums[t][at], d[first_channel + at], now.x[i], now.z[i]);
            }
        }
        now = next;
    }
    if (inside) store_part<D_STATE, LANES, STATES>(states + span.write * size, lane, h);
}
