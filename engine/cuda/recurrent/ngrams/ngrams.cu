// What a layer adds to its input for the last LENGTH tokens (engine/model/config/ngrams.py): the rows of the table that are
// read, gates, and a convolution over TAPS inputs, LENGTH tokens apart. GRAMS heads for each length.
//
// x, inputs: [T][channels], streams of `columns` side by side. numbers: multipliers (LENGTH), sizes and offsets (ROWS each).
// known: rows of PAST_TOKENS floats, 1 + the id of each of a sequence's last tokens or 0 for none, the oldest first; kept:
// rows of [PAST][channels], the last inputs of its convolution in the same order. Needs recurrent.cuh. All wait before
// touching memory; a row's bits depend on its own sequence alone.

constexpr int ROWS = (LENGTH - 1) * GRAMS;
constexpr int PAST_TOKENS = LENGTH - 1;
constexpr int PAST = (TAPS - 1) * LENGTH;
constexpr int TILE = 8;  // rows of one block of prompts; rows.py has the same number

// The rows of the table that a token reads; before(n): the id n tokens before it, below zero for none.
template <class Before>
DEVICE void choose_rows(int token, Before before, const u64* numbers, u64 end, int lane, int lanes, int* out) {
    for (int head = lane; head < ROWS; head += lanes) {
        u64 mixed = (u64)token * numbers[0];
        bool cut = false;
        for (int back = 1; back <= head / GRAMS + 1; ++back) {
            const int id = before(back);
            cut = cut || id < 0 || (u64)id == end;
            mixed ^= (cut ? end : (u64)id) * numbers[back];
        }
        out[head] = (int)(mixed % numbers[LENGTH + head] + numbers[LENGTH + ROWS + head]);
    }
}

// One new token of each slot: row b is slot b. grid (rows). A row with position -1 reads no row (-1), and keeps nothing.
extern "C" __global__ void __launch_bounds__(128)
    ngram_rows_decode(const int* tokens, const u64* numbers, u64 end, float* known, int places, const int* positions,
                      const int* offsets, int* out) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.x;
    const int position = positions[row];
    if (position < 0) {
        for (int i = threadIdx.x; i < ROWS; i += 128) out[row * ROWS + i] = -1;
        return;
    }
    const int offset = offsets[row], token = tokens[row];
    const float* const past = known + (row * places + place_of(position - 1, offset, places)) * PAST_TOKENS;
    auto before = [&](int back) { return position == 0 ? -1 : (int)past[PAST_TOKENS - back] - 1; };
    choose_rows(token, before, numbers, end, threadIdx.x, 128, out + row * ROWS);
    float* const behind = known + (row * places + place_of(position, offset, places)) * PAST_TOKENS;
    for (int i = threadIdx.x; i < PAST_TOKENS; i += 128)
        behind[i] = i == PAST_TOKENS - 1 ? token + 1.0f : position == 0 ? 0.0f : past[i + 1];
}

// Rows of prompts, one warp each. grid (tiles). tiles: (span, its first row in the span).
extern "C" __global__ void __launch_bounds__(256)
    ngram_rows_prompt(const int* tokens, const u64* numbers, u64 end, const float* known, const PromptSpan* spans,
                      const int2* tiles, int* out) {
    pdl_launch();
    pdl_wait();
    const int2 tile = tiles[blockIdx.x];
    const PromptSpan span = spans[tile.x];
    const int t = tile.y + threadIdx.x / 32;
    if (t >= span.n_rows) return;
    const float* const past = known + (i64)span.read * PAST_TOKENS;
    auto before = [&](int back) {
        if (t >= back) return tokens[span.row + t - back];
        return span.n_past > 0 ? (int)past[PAST_TOKENS + t - back] - 1 : -1;
    };
    const i64 row = span.row + t;
    choose_rows(tokens[row], before, numbers, end, threadIdx.x % 32, 32, out + row * ROWS);
}

// x_s += v_s = gate_s * value, and inputs_s = the norm of v_s. products: rows of the streams' keys and then the value;
// norms: of keys, queries (x) and inputs, [3][channels]. grid (T, streams).
extern "C" __global__ void __launch_bounds__(256)
    ngram_gate(const float* products, int columns, const float* norms, float eps_key, float eps_query, float eps_conv,
               float least, float* x, float* inputs) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const int streams = gridDim.y, channels = streams * columns;
    const i64 row = blockIdx.x, first = (i64)blockIdx.y * columns, at = row * channels + first;
    const float* const key = products + row * (channels + columns) + first;
    const float* const value = products + row * (channels + columns) + channels;
    float keys = 0.0f, queries = 0.0f, values = 0.0f, dot = 0.0f;
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float k = key[i], q = x[at + i], v = value[i];
        keys = fmaf(k, k, keys), queries = fmaf(q, q, queries), values = fmaf(v, v, values);
        dot = fmaf(__fmul_rn(k, norms[first + i]), __fmul_rn(q, norms[channels + first + i]), dot);
    }
    keys = sqrtf(block_sum(keys, scratch) / columns + eps_key);
    queries = sqrtf(block_sum(queries, scratch) / columns + eps_query);
    values = block_sum(values, scratch) / columns;
    const float score = block_sum(dot, scratch) / (keys * queries) / sqrtf((float)columns);
    const float root = sqrtf(fmaxf(fabsf(score), least));
    const float gate = logistic(score > 0.0f ? root : score < 0.0f ? -root : 0.0f);
    const float length = sqrtf(fmaf(__fmul_rn(gate, gate), values, eps_conv));
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = __fmul_rn(gate, value[i]);
        inputs[at + i] = __fmul_rn(v / length, norms[2 * channels + first + i]);
        x[at + i] += v;
    }
}

// x += silu of a channel's convolution; input(n): of the channel, n tokens before. weight (channels, TAPS), the newest last.
template <class Input>
DEVICE void add_convolved(float* x, const float* weight, Input input) {
    float sum = __fmul_rn(input(PAST), weight[0]);
#pragma unroll
    for (int tap = 1; tap < TAPS; ++tap) sum = fmaf(input((TAPS - 1 - tap) * LENGTH), weight[tap], sum);
    *x = __fadd_rn(*x, silu(sum));
}

// One new token of each slot. grid (blocks of channels, rows).
extern "C" __global__ void __launch_bounds__(256)
    ngram_conv_decode(const float* inputs, const float* weight, int channels, float* kept, int places, const int* positions,
                      const int* offsets, float* x) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.y;
    const int position = positions[row], channel = blockIdx.x * 256 + threadIdx.x;
    if (position < 0 || channel >= channels) return;
    const int offset = offsets[row];
    const i64 size = (i64)PAST * channels, at = row * channels + channel;
    const float* const past = kept + (row * places + place_of(position - 1, offset, places)) * size + channel;
    float* const behind = kept + (row * places + place_of(position, offset, places)) * size + channel;
    const float own = inputs[at];
    auto input = [&](int back) {
        return back == 0 ? own : position == 0 ? 0.0f : past[(i64)(PAST - back) * channels];
    };
    add_convolved(x + at, weight + (i64)channel * TAPS, input);
    for (int i = 0; i < PAST; ++i) behind[(i64)i * channels] = input(PAST - 1 - i);
}

// Rows of prompts. grid (blocks of channels, tiles).
extern "C" __global__ void __launch_bounds__(256)
    ngram_conv_prompt(const float* inputs, const float* weight, int channels, const float* kept, const PromptSpan* spans,
                      const int2* tiles, float* x) {
    pdl_launch();
    pdl_wait();
    const int channel = blockIdx.x * 256 + threadIdx.x;
    if (channel >= channels) return;
    const int2 tile = tiles[blockIdx.y];
    const PromptSpan span = spans[tile.x];
    const float* const past = kept + (i64)span.read * PAST * channels + channel;
    for (int t = tile.y; t < min(tile.y + TILE, span.n_rows); ++t) {
        auto input = [&](int back) {
            if (t >= back) return inputs[(i64)(span.row + t - back) * channels + channel];
            return span.n_past > 0 ? past[(i64)(PAST + t - back) * channels] : 0.0f;
        };
        add_convolved(x + (i64)(span.row + t) * channels + channel, weight + (i64)channel * TAPS, input);
    }
}

// What prompts keep, when nothing reads the states any more: both may be in one row. grid (blocks of channels, spans).
extern "C" __global__ void __launch_bounds__(256)
    ngram_keep(const int* tokens, const float* inputs, int channels, float* known, float* kept, const PromptSpan* spans) {
    pdl_launch();
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    const int channel = blockIdx.x * 256 + threadIdx.x;
    if (channel == 0) {
        for (int i = 0; i < PAST_TOKENS; ++i) {  // upwards: what is read is behind what is written
            const int t = span.n_rows - PAST_TOKENS + i;
            const float old = t < 0 && span.n_past > 0 ? known[(i64)span.read * PAST_TOKENS + PAST_TOKENS + t] : 0.0f;
            known[(i64)span.write * PAST_TOKENS + i] = t >= 0 ? tokens[span.row + t] + 1.0f : old;
        }
    }
    if (channel >= channels) return;
    const float* const past = kept + (i64)span.read * PAST * channels + channel;
    float* const behind = kept + (i64)span.write * PAST * channels + channel;
    for (int i = 0; i < PAST; ++i) {
        const int t = span.n_rows - PAST + i;
        const float old = t < 0 && span.n_past > 0 ? past[(i64)(PAST + t) * channels] : 0.0f;
        behind[(i64)i * channels] = t >= 0 ? inputs[(i64)(span.row + t) * channels + channel] : old;
    }
}
