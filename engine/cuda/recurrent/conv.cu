// The causal convolution of a recurrent layer over the last D_CONV inputs of each channel, and what becomes of its result.
//
// x: rows of x_row floats. GATED 0: the inputs are the first `channels` of a row, and out = silu(bias + convolution).
// GATED 1: a row is b, c and u, `channels` floats each; the inputs are b * u, and out = c * (bias + convolution).
// weight (channels, D_CONV), the newest input's last; bias (channels) or null. state: rows of (channels, D_CONV - 1), the
// last inputs, oldest first. out (rows, channels).
// A thread computes WIDE neighbouring channels; rows of x are aligned to WIDE floats.

constexpr int PAST = D_CONV - 1;
constexpr int TILE = 8;  // rows of one block; rows.py has the same number
static_assert(PAST >= 1 && PAST <= TILE, "only the first tile of a span reads the state");

// Inputs of WIDE channels; row: where the first of them is in a row of x.
DEVICE void load_inputs(const float* row, int channels, float* input) {
    load_wide<WIDE, WIDE>(row, input);
    if constexpr (GATED) {
        float u[WIDE];
        load_wide<WIDE, WIDE>(row + 2 * channels, u);
#pragma unroll
        for (int c = 0; c < WIDE; ++c) input[c] = __fmul_rn(input[c], u[c]);
    }
}

DEVICE void finish(const float* row, int channels, const float* sums, float* out) {
    float y[WIDE];
    if constexpr (GATED) load_wide<WIDE, WIDE>(row + channels, y);
#pragma unroll
    for (int c = 0; c < WIDE; ++c) y[c] = GATED ? __fmul_rn(y[c], sums[c]) : silu(sums[c]);
    store_wide<WIDE, WIDE>(out, y);
}

// One new token of each slot: row b is slot b. grid (blocks of channels, rows). A row with position -1 is left alone; at
// position 0 the past is zero. Positions, offsets and the state in front are read before the wait: the first kernel of a
// step must not be launched early.
extern "C" __global__ void __launch_bounds__(128)
    conv_decode(const float* x, int x_row, const float* weight, const float* bias, float* state, int places,
                const int* positions, const int* offsets, float* out, int channels) {
    pdl_launch();
    const int row = blockIdx.y, channel = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    const int position = positions[row];
    if (position < 0 || channel >= channels) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int offset = offsets[row];
    const i64 size = (i64)channels * PAST, slot = (i64)row * places;
    Channels<WIDE, D_CONV> mine;
    mine.load_weights(weight, bias, channel);
    if (position == 0) {
        mine.forget();
    } else {
        mine.load_state(state + (slot + place_of(position - 1, offset, places)) * size, channel);
    }
    pdl_wait();
    const float* from = x + (i64)row * x_row + channel;
    float input[WIDE], sums[WIDE];
    load_inputs(from, channels, input);
    mine.step(input, sums);
    finish(from, channels, sums, out + (i64)row * channels + channel);
    mine.store_state(state + (slot + place_of(position, offset, places)) * size, channel);
}

// Rows of prompts. grid (blocks of channels, tiles). tiles: (span, its first row in the span), a multiple of TILE.
// A span's first tile reads the state and writes the one behind the span, so both may be in the same row. A span without
// a past starts from zero and reads none.
extern "C" __global__ void __launch_bounds__(128)
    conv_prompt(const float* x, int x_row, const float* weight, const float* bias, float* state, const PromptSpan* spans,
                const int2* tiles, float* out, int channels) {
    pdl_launch();
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    Channels<WIDE, D_CONV> mine;
    if (channel < channels) mine.load_weights(weight, bias, channel);
    pdl_wait();
    if (channel >= channels) return;
    const int2 tile = tiles[blockIdx.y];
    const PromptSpan span = spans[tile.x];
    const int n = min(TILE, span.n_rows - tile.y);
    const i64 size = (i64)channels * PAST, first = span.row + tile.y;
    const float* from = x + first * x_row + channel;
    // The past of a row: the inputs of the rows in front of it.
    auto load_past = [&](const float* next) {
#pragma unroll
        for (int i = 0; i < PAST; ++i) {
            float input[WIDE];
            load_inputs(next + (i64)(i - PAST) * x_row, channels, input);
#pragma unroll
            for (int c = 0; c < WIDE; ++c) mine.past[c * PAST + i] = input[c];
        }
    };
    float inputs[TILE][WIDE], sums[WIDE];
#pragma unroll
    for (int t = 0; t < TILE; ++t)
        if (t < n) load_inputs(from + (i64)t * x_row, channels, inputs[t]);
    if (tile.y > 0) {
        load_past(from);
    } else if (span.n_past > 0) {
        mine.load_state(state + span.read * size, channel);
    } else {
        mine.forget();
    }
#pragma unroll
    for (int t = 0; t < TILE; ++t)
        if (t < n) {
            mine.step(inputs[t], sums);
            finish(from + (i64)t * x_row, channels, sums, out + (first + t) * channels + channel);
        }
    if (tile.y > 0) return;
    if (span.n_rows > TILE) load_past(from + (i64)span.n_rows * x_row);
    mine.store_state(state + span.write * size, channel);
}
