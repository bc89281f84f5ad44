// Shared by the attention kernels: head shape, matrix instruction, asynchronous copies, QK-norm and RoPE of one head.
//
// Where a sum of products could be contracted in two ways, the instruction is written out: two builds of a kernel must
// give the same bits.
// Defines (see attention_shape.py): HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, ROPE_DIM, ROPE_HALVES, CACHE_HALF, PAGE.
// A row of qkv is [HEADS][KEY_DIM] queries, [KV_HEADS][KEY_DIM] keys, [KV_HEADS][VALUE_DIM] values, float32, then GATE floats
// that are not read here.
// A cache is [pages][KV_HEADS][PAGE][KEY_DIM or VALUE_DIM], with CACHE_Q8 as in cached_rows.cuh. Needs cache_numbers.cuh.

#define GROUP (HEADS / KV_HEADS)
#ifndef GATE
#define GATE 0
#endif
#define ROW_WIDTH (HEADS * KEY_DIM + KV_HEADS * (KEY_DIM + VALUE_DIM) + GATE)
#define KEYS_AT (HEADS * KEY_DIM)
#define VALUES_AT ((HEADS + KV_HEADS) * KEY_DIM)
#define ROPE_PAIRS (ROPE_DIM / 2)
#define LOG2E 1.44269504088896340736f
#define LOWEST -1e30f  // finite, so that "nothing seen yet" minus itself is 0 and not NaN

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
DEVICE float not_a_number() { return __uint_as_float(0x7fffffffu); }
DEVICE float power2(float x) {  // 2^x, error below 2 ulp; minus infinity gives 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A score in base 2: raw is q.k times score_factor(); softcap 0 = off.
DEVICE float score_factor(float scale, float softcap) { return softcap > 0.0f ? scale / softcap : scale * LOG2E; }
DEVICE float score_base2(float raw, float softcap) {
    return softcap > 0.0f ? __fmul_rn(softcap * LOG2E, tanhf(raw)) : raw;
}

// With VALUES_IN_KEYS a value is the first VALUE_DIM numbers of its key: cache_v is cache_k, and keys alone are written.
// General kernels only.
#ifdef VALUES_IN_KEYS
#define VALUE_STRIDE KEY_DIM
#define WRITES_VALUES false
#else
#define VALUE_STRIDE VALUE_DIM
#define WRITES_VALUES true
#endif

// Which positions a query sees. `window` is how many, itself included, or below zero minus the length of the chunks that
// positions are cut into, of which it sees its own; 0 = all. No later ones, but with BOTH_WAYS those of its whole text, or
// where there is a window those at most window / 2 away. Such texts are in one batch, and kernels of prompts have one more
// argument, int32 (sequences,): tokens of each text.
#ifdef BOTH_WAYS
#define LENGTHS , const int* lengths
#define LENGTH_OF(sequence) lengths[sequence]
DEVICE int first_seen(int position, int window) { return window > 0 ? max(0, position - window / 2) : 0; }
DEVICE int last_seen(int position, int window, int length) {
    return min(length - 1, window > 0 ? position + window / 2 : length);
}
#else
#define LENGTHS
#define LENGTH_OF(sequence) 0
DEVICE int first_seen(int position, int window) {
    if (window > 0) return max(0, position - window + 1);
    return window < 0 ? position / -window * -window : 0;
}
DEVICE int last_seen(int position, int window, int length) { return position; }
#endif

// Every cached value is finite. A row's weight of a position that it must not see is 0, but a tile is multiplied for all
// of its rows at once, and 0 times infinity or NaN is NaN. So the kernels that write the cache store a value that is not
// finite as 0, and make an element of the position's key NaN: scores of the rows that see the position become NaN, and
// scores of all other rows are replaced by minus infinity. A kernel that does not read a row's own key from the cache
// makes the row's score of itself NaN instead.
#define SPOILT_KEY_AT (KEY_DIM - 1)  // with VALUES_IN_KEYS behind the numbers that are values
#if defined(VALUES_IN_KEYS) && !defined(UNMARKED)
static_assert(KEY_DIM > VALUE_DIM, "a key has a number that is not part of its value");
#endif

// With ALIBI the general kernels have one more argument, float32 (HEADS,): what a score loses per position of distance.
// With DISTANCES, which kernels of prompts alone know, it is float32 (HEADS, 2 * DISTANCES + 1): what a score gains by the
// position of the key less that of the query, from -DISTANCES to DISTANCES, beyond which it is as there.
#ifdef ALIBI
#define SLOPES , const float* slopes
DEVICE float with_bias(float score, const float* slopes, int head, int distance) {
    return fmaf(-slopes[head] * LOG2E, fabsf((float)distance), score);
}
#elif defined(DISTANCES)
#define SLOPES , const float* slopes
DEVICE float with_bias(float score, const float* gains, int head, int distance) {
    const int place = min(max(-distance, -DISTANCES), DISTANCES) + DISTANCES;
    return fmaf(LOG2E, gains[head * (2 * DISTANCES + 1) + place], score);
}
#else
#define SLOPES
DEVICE float with_bias(float score, const float*, int, int) { return score; }
#endif

// What the kernels of prompts take, whichever serves a shape; see attention_prefill_half.cu.
#define PREFILL_PARAMETERS                                                                        \
    const float* qkv, const cache_t* cache_k, const cache_t* cache_v, const int* block_table,     \
    int max_pages, const int4* tiles, float scale, float softcap, int window, const float* sinks, \
    float* out, int pitch SLOPES LENGTHS

// Softmax denominator and common factor once everything is known; a sink adds weight without a value.
DEVICE float final_factor(float top, float sum, const float* sinks, int head) {
    if (!sinks) return 1.0f / sum;
    const float sink = sinks[head] * LOG2E, high = fmaxf(top, sink), shrink = power2(top - high);
    return shrink / fmaf(sum, shrink, power2(sink - high));
}

// Place of position `p` of a sequence, in rows of KEY_DIM or VALUE_DIM elements.
DEVICE i64 cache_row(int page, int kv_head, int p) {
    return ((i64)page * KV_HEADS + kv_head) * PAGE + (p & (PAGE - 1));
}

// Two floats as float16 pairs: hi = rounded, lo = what rounding lost. hi + lo has about 22 bits.
DEVICE void split_halves(float x, float y, u32& hi, u32& lo) {
    hi = two_halves(x, y);
    lo = two_halves(x - low_half(hi), y - high_half(hi));
}

// cos and sin of every rotated pair at a position, times rope_scale. All threads of the block; barrier afterwards.
// The angle is formed and brought near zero in float64: at position 100 000 a float32 product is off by 0.005 rad.
DEVICE void rope_angles(float2* table, int position, const double* inv_freq, float rope_scale) {
    const double turn = 6.283185307179586;
    for (int i = threadIdx.x; i < ROPE_PAIRS; i += blockDim.x) {
        const double angle = (double)position * inv_freq[i];
        float s, c;
        sincosf((float)fma(-turn, rint(angle * (1.0 / turn)), angle), &s, &c);
        table[i] = make_float2(c * rope_scale, s * rope_scale);
    }
}

// Factor on the queries of a position: 1 + scale ln(1 + floor((position + offset) / length)); scale 0 = off.
struct Temperature {
    float scale;
    int length, offset;
};
DEVICE float query_factor(Temperature temperature, int position) {
    if (temperature.scale == 0.0f) return 1.0f;
    return fmaf(temperature.scale, logf(1.0f + (float)((position + temperature.offset) / temperature.length)), 1.0f);
}

// One warp: `to` = RoPE(RMSnorm(from + bias) * weight). weight and bias may be null; `to` must not be read by other
// warps meanwhile, and may be `from`.
DEVICE void norm_and_rotate(const float* from, const float* bias, float* to, const float* weight, float eps,
                            const float2* table) {
    const int lane = threadIdx.x & 31;
    float squares = 0.0f;
#pragma unroll 4
    for (int d = lane; d < KEY_DIM; d += WARP) {
        const float v = bias ? from[d] + bias[d] : from[d];
        squares = fmaf(v, v, squares);
        to[d] = v;
    }
    if (weight) {
        const float r = 1.0f / sqrtf(warp_sum(squares) / KEY_DIM + eps);
        for (int d = lane; d < KEY_DIM; d += WARP) to[d] = to[d] * r * weight[d];
    }
    __syncwarp();
    for (int i = lane; i < ROPE_PAIRS; i += WARP) {
        const int a = ROPE_HALVES ? i : 2 * i, b = ROPE_HALVES ? i + ROPE_PAIRS : 2 * i + 1;
        const float x = to[a], y = to[b], c = table[i].x, s = table[i].y;
        to[a] = fmaf(x, c, -__fmul_rn(y, s));
        to[b] = fmaf(x, s, __fmul_rn(y, c));
    }
    __syncwarp();
}
