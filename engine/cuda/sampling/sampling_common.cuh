// What the sampling kernel is made of: its structures, the exact weights, sums and maxima of a block, meetings of the
// blocks of a row. A candidate is one 64-bit key: logit as an ordered integer, then the complement of its id, so
// larger = earlier in the order of the host sampler.
// Defines: THREADS of a block, which no result depends on.

#define WARPS (THREADS / WARP)
#define MAXIMA 128
#define CANDIDATES 1024
#define BINS 2048
#define TOP_LOGPROBS 32
#define PRELOADED 8
#define ID_MASK 0x3fffffu
#define KEY_NEGATIVE_INFINITY 0x007fffffu
#define KEY_POSITIVE_INFINITY 0xff800000u
#define FIXED_ONE 1099511627776.0f  // 2^40

struct SamplingRow {  // 64 bytes; sampler.py ROW has the same fields
    float temperature;
    int top_k;
    float top_p, min_p, typical_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int penalty_last_n;
    u32 seed_low, seed_high;
    u32 output_index;  // advanced here
    int n_bias;
    int n_logprobs;  // -1: none, 0: the chosen token only
    int limit;  // the row stops where this position would be fed
    u32 mask;  // NO_MASK, MASK or MASK_FREE_LOGPROBS
};
constexpr u32 NO_MASK = 0, MASK = 1, MASK_FREE_LOGPROBS = 2;

struct Control {  // 96 bytes a row, all zero between launches
    u32 arrived, left, counts[14];
    u64 raw_mass, mass, downward, best;
};

struct Arguments {
    float* logits;  // (B, V); a masked row loses the tokens that its mask does not allow
    int V, B;
    const int* slots;         // (B,) row of the per-slot tables; null: row b is slot b; -1: padding
    SamplingRow* rows;        // (slots,)
    const int* bias_ids;      // (slots, bias_stride)
    const float* bias_values; // (slots, bias_stride)
    int bias_stride;
    int* history;  // (slots, context): token at every position
    int context;
    int* next_token;  // (slots,)
    int* positions;   // (slots,) position of the token these logits come from; -1: padding
    u32* step;        // [0] steps done, [1] rows done in this step
    int ring, most_rows;      // the ring's row for a step is step % ring
    int* out_tokens;          // (ring, most_rows)
    float* out_logprobs;      // (ring, most_rows)
    int* out_top_ids;         // (ring, most_rows, 32)
    float* out_top_logprobs;  // (ring, most_rows, 32)
    float* adjusted;         // (B, V) logits after bias and penalties
    u64* maxima;             // (B, 2, 128)
    Control* control;        // (B,)
    u64* histograms;         // (B, 3, 2048), all zero between launches
    u64* candidates;         // (B, 3, 1024): top-k, log-probabilities, select()
    const u32* masks;        // (slots, mask_stride): bit i % 32 of word i / 32 allows token i; null where no row is masked
    int mask_stride;
};

struct Shared {
    u64 pool[3 * CANDIDATES];  // sort: keys, sorted, mass; histogram: low and high words; penalties: counts and bias
    u64 maxima[MAXIMA];
    u64 warp_u64[WARPS];
    u64 found, found_rest;
    u32 flag;
    SamplingRow row;
    int slot, position;
    u32 ring_row;
};

// What a pass over the row looks at: a source, the weight of a token, and which tokens are still in.
struct View {
    const float* source;
    float largest, temperature;
    u64 cut;          // key of the last token that is in
    bool typical;     // tokens must also reach typical_cut
    float mean;
    u64 typical_cut;
    float least_weight;
};

struct Block {  // this block's share of the row, and the row's memory for meeting and selecting
    Shared* s;
    Control* control;
    u64* histograms;
    u64* selected;
    int b, lo, hi;
    bool wide;  // rows begin at multiples of four logits
    u32 meetings, passes, selects;
};

DEVICE u32 order_of(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));  // -0 becomes +0
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;  // NaN wins, so that it is noticed
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(u64 key) {
    const u32 order = (u32)(key >> 32);
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
DEVICE u64 key_of(u32 order, u32 id) { return ((u64)order << 32) | (ID_MASK - id); }
DEVICE int id_of(u64 key) { return (int)(ID_MASK - (u32)(key & ID_MASK)); }
DEVICE bool usable(u64 key) {
    const u32 order = (u32)(key >> 32);
    return order > KEY_NEGATIVE_INFINITY && order < KEY_POSITIVE_INFINITY;
}

DEVICE u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u64 load_l2(const u64* p) {  // written by other blocks: never from this multiprocessor's L1
    u64 v;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// ---- weights: the same single operations as engine/sampling/fixed_point.py ------------------------------------------
DEVICE float exponential(float x) {
    if (x < -30.0f) return 0.0f;
    const float n = rintf(__fmul_rn(x, 1.44269504f));
    float r = __fsub_rn(x, __fmul_rn(n, 0.693359375f));
    r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
    float y = __fmul_rn(r, (float)(1.0 / 5040.0));
    y = __fmul_rn(__fadd_rn(y, (float)(1.0 / 720.0)), r);
    y = __fmul_rn(__fadd_rn(y, (float)(1.0 / 120.0)), r);
    y = __fmul_rn(__fadd_rn(y, (float)(1.0 / 24.0)), r);
    y = __fmul_rn(__fadd_rn(y, (float)(1.0 / 6.0)), r);
    y = __fmul_rn(__fadd_rn(y, 0.5f), r);
    y = __fadd_rn(__fadd_rn(__fmul_rn(y, r), r), 1.0f);
    return __fmul_rn(y, __int_as_float(((int)n + 127) << 23));
}
DEVICE float distance(float value, float largest, float temperature) {
    const float below = __fsub_rn(value, largest);
    return temperature == 1.0f ? below : __fdiv_rn(below, temperature);  // the same, in a tenth of the instructions
}
DEVICE u64 fixed_point(float weight) { return __float2ull_rz(__fmul_rn(weight, FIXED_ONE)); }
DEVICE u64 share(float p, u64 total) {
    const u64 mass = (u64)ceil(__dmul_rn((double)p, (double)total));
    return mass > 0 ? mass : 1;
}
DEVICE u64 share_random(u32 random, u64 total) {  // floor(random * total / 2^24) for total < 2^63
    return random * (total >> 24) + ((random * (total & 0xffffffu)) >> 24);
}
DEVICE u64 typical_key(float x, float mean, u32 id) {
    return ((u64)(~__float_as_uint(fabsf(__fsub_rn(x, mean)))) << 32) | (ID_MASK - id);
}
DEVICE float typical_mean(u64 downward, u64 mass) { return (float)(-__ddiv_rn((double)downward, (double)mass)); }
DEVICE u64 downward_of(float x, float weight, u64 q) { return q ? fixed_point(__fmul_rn(-x, weight)) : 0; }

DEVICE u32 uniform24(u32 k0, u32 k1, u32 index) {  // Philox-4x32-10, counter (index, 0, 0, 0)
    u32 c0 = index, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        const u32 high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0 >> 8;
}

// ---- inside a block ----------------------------------------------------------------------------------------------
// Sum of v over the threads before this one; total over all. Ends with a barrier.
DEVICE u64 block_scan(Shared* s, u64 v, u64* total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 sum = v;
#pragma unroll
    for (int offset = 1; offset < WARP; offset <<= 1) {
        const u64 other = __shfl_up_sync(FULL_MASK, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == WARP - 1) s->warp_u64[warp] = sum;
    __syncthreads();
    u64 before = 0, all = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        const u64 part = s->warp_u64[i];
        if (i < warp) before += part;
        all += part;
    }
    __syncthreads();
    *total = all;
    return before + sum - v;
}

DEVICE u64 warp_max_u64(u64 v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        const u64 other = __shfl_xor_sync(FULL_MASK, v, offset);
        if (other > v) v = other;
    }
    return v;
}

DEVICE u64 block_max_u64(Shared* s, u64 v) {
    v = warp_max_u64(v);
    if ((threadIdx.x & 31) == 0) s->warp_u64[threadIdx.x >> 5] = v;
    __syncthreads();
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i)
        if (s->warp_u64[i] > best) best = s->warp_u64[i];
    __syncthreads();
    return best;
}

// Four logits from `id` on, which is a multiple of four; past the block's tokens zeros.
DEVICE float4 load_four(const Block& k, const float* source, int id) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* const from = source + id;
    if (k.wide) {
        if (id < k.hi) v = *(const float4*)from;
    } else {
        if (id < k.hi) v.x = from[0];
        if (id + 1 < k.hi) v.y = from[1];
        if (id + 2 < k.hi) v.z = from[2];
        if (id + 3 < k.hi) v.w = from[3];
    }
    return v;
}

// Calls f(id, value) for this block's tokens, each thread always for the same ones, in rising order; a thread asks for
// FOURS times four of them at once.
template <int FOURS, class F>
DEVICE void for_each(const Block& k, const float* source, F f, int skip = 0) {
    for (int base = k.lo + skip + 4 * (int)threadIdx.x; base < k.hi; base += 4 * THREADS * FOURS) {
        float4 v[FOURS];
#pragma unroll
        for (int j = 0; j < FOURS; ++j) v[j] = load_four(k, source, base + j * 4 * THREADS);
#pragma unroll
        for (int j = 0; j < FOURS; ++j) {
            const int id = base + j * 4 * THREADS;
            if (id < k.hi) f(id, v[j].x);
            if (id + 1 < k.hi) f(id + 1, v[j].y);
            if (id + 2 < k.hi) f(id + 2, v[j].z);
            if (id + 3 < k.hi) f(id + 3, v[j].w);
        }
    }
}

// ---- between the blocks of a row ---------------------------------------------------------------------------------
DEVICE void row_meet(Block& k) {
    __syncthreads();
    k.meetings += gridDim.x;
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&k.control->arrived, 1u);
        while (load_acquire(&k.control->arrived) < k.meetings) {
        }
        __threadfence();
    }
    __syncthreads();
}

// Largest keys of `groups` parts of this block, into the row's table; complete after the next row_meet() or leave().
// preloaded: this thread's first values of source, or null.
DEVICE void publish_maxima(Block& k, const float* source, const float* preloaded, u64* table, int groups) {
    u32 best = 0, best_id = 0;
    auto take = [&](int id, float v) {
        const u32 order = order_of(v);
        if (order > best) best = order, best_id = id;  // ids rise: a tie keeps the lower one
    };
    if (preloaded) {
#pragma unroll
        for (int j = 0; j < PRELOADED; ++j) {
            const int id = k.lo + (int)threadIdx.x + j * THREADS;
            if (id < k.hi) take(id, preloaded[j]);
        }
    }
    for_each<8>(k, source, take, preloaded ? PRELOADED * THREADS : 0);
    u64 key = best ? key_of(best, best_id) : 0;
    if (groups > WARPS) {  // parts of a warp
        const int lanes = THREADS / groups;
        for (int offset = lanes / 2; offset > 0; offset >>= 1) {
            const u64 other = __shfl_xor_sync(FULL_MASK, key, offset);
            if (other > key) key = other;
        }
        if (threadIdx.x % lanes == 0) {
            table[blockIdx.x * groups + threadIdx.x / lanes] = key;
            __threadfence();
        }
        return;
    }
    key = warp_max_u64(key);
    if ((threadIdx.x & 31) == 0) k.s->warp_u64[threadIdx.x >> 5] = key;
    __syncthreads();
    if (threadIdx.x < groups) {
        const int per = WARPS / groups;
        u64 largest = 0;
        for (int i = 0; i < per; ++i) {
            const u64 other = k.s->warp_u64[threadIdx.x * per + i];
            if (other > largest) largest = other;
        }
        table[blockIdx.x * groups + threadIdx.x] = largest;
        __threadfence();
    }
}

// The largest key of the row, and a key that at least `wanted` tokens reach (0 where the table cannot tell).
DEVICE u64 read_maxima(Block& k, const u64* table, int groups, int wanted, u64* bound) {
    Shared* s = k.s;
    const int n = gridDim.x * groups;
    if (threadIdx.x < MAXIMA) s->maxima[threadIdx.x] = threadIdx.x < n ? load_l2(table + threadIdx.x) : 0;
    if (threadIdx.x == 0) s->found = s->found_rest = 0;
    __syncthreads();
    if (threadIdx.x < MAXIMA) {
        const u64 mine = s->maxima[threadIdx.x];
        int above = 0;
#pragma unroll 16
        for (int i = 0; i < MAXIMA; ++i) above += s->maxima[i] > mine;
        if (mine && above == 0) s->found = mine;
        if (mine && above == wanted - 1) s->found_rest = mine;
    }
    __syncthreads();
    *bound = s->found_rest;
    const u64 largest = s->found;
    __syncthreads();
    return largest;
}

// Appends the keys that reach bound to the list, counting all of them.
DEVICE void gather(Block& k, const float* source, u64 bound, u64* list, u32* count) {
    for_each<4>(k, source, [&](int id, float v) {
        const u64 key = key_of(order_of(v), id);
        if (key >= bound) {
            const u32 at = atomicAdd(count, 1u);
            if (at < CANDIDATES) list[at] = key;
        }
    });
}

// ---- sorted candidates: one block --------------------------------------------------------------------------------
// Reads n <= 1024 keys, leaves the first `wanted` of them in order in pool[1024...]; returns how many.
DEVICE int sort_candidates(Shared* s, const u64* list, int n, int wanted) {
    u64* keys = s->pool;
    u64* sorted = s->pool + CANDIDATES;
    for (int i = threadIdx.x; i < n; i += THREADS) keys[i] = load_l2(list + i);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const u64 mine = keys[i];
        int above = 0;
#pragma unroll 8
        for (int j = 0; j < n; ++j) above += keys[j] > mine;
        if (above < wanted) sorted[above] = mine;
    }
    __syncthreads();
    return n < wanted ? n : wanted;
}
