// The causal convolution of a Mamba layer over the last D_CONV inputs of each channel, then SiLU.
//
// xz: rows of 2 * d_inner floats; the inputs are the first d_inner. weight (d_inner, D_CONV), the newest input's last;
// bias (d_inner). state: rows of (d_inner, D_CONV - 1), the last inputs, oldest first. out (rows, d_inner).
// A thread computes WIDE neighbouring channels, whose memory it reads and writes in vectors of WIDE floats. The order of
// a token's operations is the same in both kernels.

constexpr int PAST = D_CONV - 1;
constexpr int TILE = 8;  // rows of one block; mamba_plan.py has the same number
static_assert(PAST >= 1 && PAST <= TILE, "only the first tile of a span reads the state");

// COUNT floats at p, which is aligned to WIDE of them.
template <int COUNT>
DEVICE void load(const float* p, float* to) {
    if constexpr (WIDE == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 v = *(const float4*)(p + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) to[i] = p[i];
    }
}

template <int COUNT>
DEVICE void store(float* p, const float* from) {
    if constexpr (WIDE == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            *(float4*)(p + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) p[i] = from[i];
    }
}

struct Channels {
    float weight[WIDE * D_CONV], bias[WIDE];
    float past[WIDE * PAST];  // of each channel, oldest first

    __device__ __forceinline__ void load_weights(const float* weights, const float* biases, int channel) {
        load<WIDE * D_CONV>(weights + channel * D_CONV, weight);
        load<WIDE>(biases + channel, bias);
    }

    __device__ __forceinline__ void forget() {
#pragma unroll
        for (int i = 0; i < WIDE * PAST; ++i) past[i] = 0.0f;
    }

    // The past of a row, of which `next` is the first channel's input: the rows in front of it.
    __device__ __forceinline__ void load_past(const float* next, i64 stride) {
#pragma unroll
        for (int i = 0; i < PAST; ++i) {
            float x[WIDE];
            load<WIDE>(next + (i - PAST) * stride, x);
#pragma unroll
            for (int c = 0; c < WIDE; ++c) past[c * PAST + i] = x[c];
        }
    }

    // out = silu(bias + sum of weight * input); x becomes the newest of the past.
    __device__ __forceinline__ void step(const float* x, float* out) {
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
            const float* w = weight + c * D_CONV;
            float* p = past + c * PAST;
            float sum = __fmul_rn(p[0], w[0]);
#pragma unroll
            for (int i = 1; i < PAST; ++i) sum = fmaf(p[i], w[i], sum);
            out[c] = silu(__fadd_rn(fmaf(x[c], w[PAST], sum), bias[c]));
#pragma unroll
            for (int i = 1; i < PAST; ++i) p[i - 1] = p[i];
            p[PAST - 1] = x[c];
        }
    }
};

// One new token of each slot: row b is slot b. grid (blocks of channels, rows). A row with position -1 is left alone; at
// position 0 the past is zero. Positions, offsets and the state in front are read before the wait: the first kernel of a
// step must not be launched early.
extern "C" __global__ void __launch_bounds__(128)
    conv_decode(const float* xz, const float* weight, const float* bias, float* state, int places, const int* positions,
                const int* offsets, float* out, int d_inner) {
    pdl_launch();
    const int row = blockIdx.y, channel = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    const int position = positions[row];
    if (position < 0 || channel >= d_inner) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int offset = offsets[row];
    const i64 size = (i64)d_inner * PAST, slot = (i64)row * places;
    Channels channels;
    channels.load_weights(weight, bias, channel);
    if (position == 0) {
        channels.forget();
    } else {
        load<WIDE * PAST>(state + (slot + place_of(position - 1, offset, places)) * size + channel * PAST, channels.past);
    }
    pdl_wait();
    float x[WIDE], y[WIDE];
    load<WIDE>(xz + (i64)row * 2 * d_inner + channel, x);
    channels.step(x, y);
    store<WIDE>(out + (i64)row * d_inner + channel, y);
    store<WIDE * PAST>(state + (slot + place_of(position, offset, places)) * size + channel * PAST, channels.past);
}

// Rows of prompts. grid (blocks of channels, tiles). tiles: (span, its first row in the span), a multiple of TILE.
// A span's first tile reads the state and writes the one behind the span, so both may be in the same row. A span without
// a past starts from zero and reads none.
extern "C" __global__ void __launch_bounds__(128)
    conv_prompt(const float* xz, const float* weight, const float* bias, float* state, const PromptSpan* spans,
                const int2* tiles, float* out, int d_inner) {
    pdl_launch();
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    Channels channels;
    if (channel < d_inner) channels.load_weights(weight, bias, channel);
    pdl_wait();
    if (channel >= d_inner) return;
    const int2 tile = tiles[blockIdx.y];
    const PromptSpan span = spans[tile.x];
    const int n = min(TILE, span.n_rows - tile.y);
    const i64 size = (i64)d_inner * PAST, first = span.row + tile.y;
    const i64 stride = 2 * (i64)d_inner;
    const float* from = xz + first * stride + channel;
    float x[TILE][WIDE], y[WIDE];
#pragma unroll
    for (int t = 0; t < TILE; ++t)
        if (t < n) load<WIDE>(from + t * stride, x[t]);
    if (tile.y > 0) {
        channels.load_past(from, stride);
    } else if (span.n_past > 0) {
        load<WIDE * PAST>(state + span.read * size + channel * PAST, channels.past);
    } else {
        channels.forget();
    }
#pragma unroll
    for (int t = 0; t < TILE; ++t)
        if (t < n) {
            channels.step(x[t], y);
            store<WIDE>(out + (first + t) * d_inner + channel, y);
        }
    if (tile.y > 0) return;
    if (span.n_rows > TILE) channels.load_past(from + span.n_rows * stride, stride);
    store<WIDE * PAST>(state + span.write * size + channel * PAST, channels.past);
}
