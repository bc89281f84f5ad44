// Lightning attention behind the first product of a layer: linear attention with a fixed decay per head. Of each head of HEAD
// columns and its memory M (HEAD values, HEAD keys), for each token:
//     M = decay * M + v (x) k;  out = M q,  with q, k and v the silu of what the product gave
//
// mixed: rows of mixed_row floats, of each head q, k and v side by side, then what is not read here. decay (heads). memory:
// rows of (heads, HEAD values, HEAD keys). out (rows, heads * HEAD).
// LANES lanes hold the keys of a value, EACH each. Prompts are computed token after token by the same operations however they
// are cut. Needs recurrent.cuh.

constexpr int THREADS = 256;
constexpr int LANES = 8;
constexpr int EACH = floats_of_a_lane(HEAD, LANES);
constexpr int PADDED = EACH * LANES;
constexpr int VALUES = THREADS / LANES;              // of a head, that a block computes; lightning.py has the same number
constexpr int PARTS = (HEAD + VALUES - 1) / VALUES;  // blocks of a head
static_assert(HEAD >= 1 && HEAD <= 256, "a lane holds at most 32 keys");

// M of the next token; returns M q, in every lane of the value.
DEVICE float remember(float* memory, float decay, float v, const float* k, const float* q) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) memory[i] = fmaf(memory[i], decay, __fmul_rn(v, k[i]));
    return dot_parts<LANES, EACH>(q, memory);
}

// One new token of each slot: row b is slot b. grid (heads * PARTS, rows). A row with position -1 is left alone; at position 0
// the memory is zero. Positions, offsets and memories in front are read before the wait: the first kernel of a step
// must not be launched early.
extern "C" __global__ void __launch_bounds__(THREADS)
    lightning_decode(const float* mixed, int mixed_row, const float* decays, float* memory, int places, const int* positions,
                     const int* offsets, float* out, int heads) {
    __shared__ __align__(16) float qs[PADDED];
    __shared__ __align__(16) float ks[PADDED];
    pdl_launch();
    const int row = blockIdx.y, position = positions[row], thread = threadIdx.x, lane = thread % LANES;
    if (position < 0) {
        pdl_wait();  // or the kernel after this one would not wait for the one in front of it
        return;
    }
    const int head = blockIdx.x / PARTS, at = blockIdx.x % PARTS * VALUES + thread / LANES, offset = offsets[row];
    const i64 read = (i64)row * places + place_of(position - 1, offset, places);
    const i64 write = (i64)row * places + place_of(position, offset, places);
    const float decay = decays[head];
    float m[EACH], q[EACH], k[EACH];
    if (position > 0 && at < HEAD) {
        load_part<HEAD, LANES, EACH, true>(memory + ((read * heads + head) * HEAD + at) * HEAD, lane, m);
    } else {
        clear_part<EACH>(m);
    }
    pdl_wait();
    const float* const given = mixed + (i64)row * mixed_row + head * 3 * HEAD;
    for (int i = thread; i < PADDED; i += THREADS) {
        qs[i] = i < HEAD ? silu(given[i]) : 0.0f;
        ks[i] = i < HEAD ? silu(given[HEAD + i]) : 0.0f;
    }
    const float v = at < HEAD ? silu(given[2 * HEAD + at]) : 0.0f;
    __syncthreads();
    load_part<PADDED, LANES, EACH, true>(qs, lane, q);
    load_part<PADDED, LANES, EACH, true>(ks, lane, k);
    const float sum = remember(m, decay, v, k, q);
    if (at >= HEAD) return;
    store_part<HEAD, LANES, EACH>(memory + ((write * heads + head) * HEAD + at) * HEAD, lane, m);
    if (lane == 0) out[((i64)row * heads + head) * HEAD + at] = sum;
}

constexpr int TOKENS = 8;  // staged in shared memory at a time: a thread stages one value

// Rows of prompts, token after token. grid (heads * PARTS, spans). A span without a past starts from zero and reads no memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    lightning_prompt(const float* mixed, int mixed_row, const float* decays, float* memory, const PromptSpan* spans,
                     float* out, int heads) {
    __shared__ __align__(16) float qs[TOKENS][PADDED];
    __shared__ __align__(16) float ks[TOKENS][PADDED];
    __shared__ float vs[TOKENS][VALUES];
    pdl_launch();
    const int thread = threadIdx.x, lane = thread % LANES, mine = thread / LANES;
    const int head = blockIdx.x / PARTS, first = blockIdx.x % PARTS * VALUES;
    const bool inside = first + mine < HEAD;
    const float decay = decays[head];
    pdl_wait();
    const PromptSpan span = spans[blockIdx.y];
    float m[EACH];
    if (span.n_past > 0 && inside) {
        load_part<HEAD, LANES, EACH, true>(memory + (((i64)span.read * heads + head) * HEAD + first + mine) * HEAD, lane, m);
    } else {
        clear_part<EACH>(m);
    }
    for (int begin = 0; begin < span.n_rows; begin += TOKENS) {
        const int n = min(TOKENS, span.n_rows - begin);
        const float* const given = mixed + (i64)(span.row + begin) * mixed_row + head * 3 * HEAD;
        __syncthreads();  // the tokens before are done with
        for (int i = thread; i < TOKENS * PADDED; i += THREADS) {
            const int token = i / PADDED, column = i % PADDED;
            const bool there = token < n && column < HEAD;
            qs[token][column] = there ? silu(given[(i64)token * mixed_row + column]) : 0.0f;
            ks[token][column] = there ? silu(given[(i64)token * mixed_row + HEAD + column]) : 0.0f;
        }
        const int token = thread / VALUES, column = first + thread % VALUES;
        vs[token][thread % VALUES] =
            token < n && column < HEAD ? silu(given[(i64)token * mixed_row + 2 * HEAD + column]) : 0.0f;
        __syncthreads();
        for (int t = 0; t < n; ++t) {
            float q[EACH], k[EACH];
            load_part<PADDED, LANES, EACH, true>(qs[t], lane, q);
            load_part<PADDED, LANES, EACH, true>(ks[t], lane, k);
            const float sum = remember(m, decay, vs[t][mine], k, q);
            if (lane == 0 && inside) out[((i64)(span.row + begin + t) * heads + head) * HEAD + first + mine] = sum;
        }
    }
    if (inside) store_part<HEAD, LANES, EACH>(memory + (((i64)span.write * heads + head) * HEAD + first + mine) * HEAD, lane, m);
}
