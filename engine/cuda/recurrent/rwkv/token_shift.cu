// RWKV's inputs that are mixed with those of the token before, and what else happens to rows between its products.
//
// x: rows of x_row floats, x' the row of the token before; zero at the beginning of a sequence. lerps (count, columns).
// state: rows of (columns), the last x of a sequence. out: rows of out_row floats, of which `count` times `columns` are
// written; change: null, or as many floats of rows of the same length. Needs recurrent.cuh.

constexpr int THREADS = 256;
constexpr int TILE = 8;  // rows of one block of prompts; rows.py has the same number

// out[c][i] = x + (x' - x) * lerps[c][i]; change[i] = x' - x
DEVICE void mix_number(float x, float before, const float* lerps, int count, int columns, int i, float* out, float* change) {
    const float difference = before - x;
    if (change) change[i] = difference;
    for (int c = 0; c < count; ++c) out[c * columns + i] = fmaf(difference, lerps[c * columns + i], x);
}

// One new token of each slot: row b is slot b. grid (blocks of columns, rows). A row with position -1 is left alone; at
// position 0 the token before is zero.
extern "C" __global__ void __launch_bounds__(THREADS)
    shift_decode(const float* x, int x_row, const float* lerps, int count, float* state, int places, const int* positions,
                 const int* offsets, float* out, int out_row, float* change, int columns) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.y;
    const int position = positions[row], i = blockIdx.x * THREADS + threadIdx.x;
    if (position < 0 || i >= columns) return;
    const int offset = offsets[row];
    const float own = x[row * x_row + i];
    float before = 0.0f;
    if (position > 0) before = state[(row * places + place_of(position - 1, offset, places)) * columns + i];
    state[(row * places + place_of(position, offset, places)) * columns + i] = own;
    mix_number(own, before, lerps, count, columns, i, out + row * out_row, change ? change + row * out_row : change);
}

// Rows of prompts. grid (blocks of columns, tiles). tiles: (span, its first row in the span), a multiple of TILE. A span's
// first tile reads the state and writes the one behind the span, so both may be in the same row.
extern "C" __global__ void __launch_bounds__(THREADS)
    shift_prompt(const float* x, int x_row, const float* lerps, int count, float* state, const PromptSpan* spans,
                 const int2* tiles, float* out, int out_row, float* change, int columns) {
    pdl_launch();
    pdl_wait();
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= columns) return;
    const int2 tile = tiles[blockIdx.y];
    const PromptSpan span = spans[tile.x];
    const i64 first = span.row + tile.y;
    float before = 0.0f;
    if (tile.y > 0) before = x[(first - 1) * x_row + i];
    else if (span.n_past > 0) before = state[(i64)span.read * columns + i];
    for (i64 row = first; row < first + min(TILE, span.n_rows - tile.y); ++row) {
        const float own = x[row * x_row + i];
        mix_number(own, before, lerps, count, columns, i, out + row * out_row, change ? change + row * out_row : change);
        before = own;
    }
    if (tile.y == 0) state[(i64)span.write * columns + i] = x[((i64)span.row + span.n_rows - 1) * x_row + i];
}

// out[c][i] = x + change * (lerps[c][i] + out[c][i]) in place. change and out: rows of out_row floats. grid (blocks of
// columns, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    shift_further(const float* x, int x_row, const float* change, const float* lerps, int count, float* out, int out_row,
                  int columns) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= columns) return;
    const float own = x[row * x_row + i], difference = change[row * out_row + i];
    for (int c = 0; c < count; ++c) {
        float* const to = out + row * out_row + c * columns + i;
        *to = fmaf(difference, lerps[c * columns + i] + *to, own);
    }
}

// The first numbers of a row become their tanh, those that follow their sigmoid. grid (rows).
extern "C" __global__ void __launch_bounds__(THREADS) squash(float* x, int x_row, int tanhs, int sigmoids) {
    pdl_launch();
    pdl_wait();
    float* const row = x + (i64)blockIdx.x * x_row;
    for (int i = threadIdx.x; i < tanhs + sigmoids; i += THREADS) row[i] = i < tanhs ? tanhf(row[i]) : logistic(row[i]);
}
