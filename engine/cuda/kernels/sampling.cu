// sample: the next token of B rows of logits, in one kernel; bit for bit what engine/sampling/sampler.py chooses.
//
// Grid (G, R): G blocks share a row through global memory, R rows run at once, further rows follow. All blocks must be
// resident together (the launcher keeps G * R at or below the number of multiprocessors), for rows that need more than
// an argmax meet at row_meet(). Every sum is an integer sum, so the order in which blocks and threads add is immaterial.
//   greedy           block maxima, the last block to leave takes the largest
//   top_k <= 1024    k-th largest of 128 partial maxima = lower bound; gather what reaches it; block 0 sorts and draws
//   everything else  cutoffs by select(): a histogram of mass or count over the logits, then a sort of the one bin that
//                    holds the answer, or, where that bin is too full (ties), further histograms digit by digit
// A candidate is one 64-bit key: logit as an ordered integer, then the complement of its id, so larger = earlier.

#define THREADS 256
#define WARPS (THREADS / WARP)
#define MAXIMA 128
#define CANDIDATES 1024
#define BINS 2048
#define TOP_LOGPROBS 32
#define ID_MASK 0x3fffffu
#define KEY_NEGATIVE_INFINITY 0x007fffffu
#define KEY_POSITIVE_INFINITY 0xff800000u
#define FIXED_ONE 1099511627776.0f  // 2^40

struct SamplingRow {  // 64 bytes; engine/cuda/sampling_ops.py ROW has the same fields
    float temperature;
    int top_k;
    float top_p, min_p, typical_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int penalty_last_n;
    u32 seed_low, seed_high;
    u32 output_index;  // advanced here
    int n_bias;
    int n_logprobs;  // -1: none, 0: the chosen token only
    u32 reserved0, reserved1;
};

struct Control {  // 96 bytes a row, all zero between launches
    u32 arrived, left, counts[14];
    u64 raw_mass, mass, downward, best;
};

struct Arguments {
    const float* logits;  // (B, V)
    int V, B;
    const int* slots;         // (B,) row of the per-slot tables; null: row b is slot b; -1: padding
    SamplingRow* rows;        // (slots,)
    const int* bias_ids;      // (slots, bias_stride)
    const float* bias_values; // (slots, bias_stride)
    int bias_stride;
    int* history;  // (slots, context): token at every position
    int context;
    int* next_token;  // (B,)
    int* positions;   // (B,) position of the token these logits come from; -1: padding
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
    u64* candidates;         // (B, 2, 1024)
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

struct Block {  // this block's share of the row
    const Arguments* a;
    Shared* s;
    int b, lo, hi;
    u32 meetings, passes, selects;
    Control* control;
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

// ---- weights: the same single operations as engine/sampling/weights.py ------------------------------------------
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
    return __fdiv_rn(__fsub_rn(value, largest), temperature);
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

// Calls f(id, value) for this block's tokens, each thread always for the same ones.
template <int UNROLL, class F>
DEVICE void for_each(const Block& k, const float* source, F f) {
    for (int base = k.lo + (int)threadIdx.x; base < k.hi; base += THREADS * UNROLL) {
        float v[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) v[j] = base + j * THREADS < k.hi ? source[base + j * THREADS] : 0.0f;
#pragma unroll
        for (int j = 0; j < UNROLL; ++j)
            if (base + j * THREADS < k.hi) f(base + j * THREADS, v[j]);
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

// Largest keys of `groups` parts of this block, into the row's table; returns nothing useful before row_meet().
DEVICE void publish_maxima(Block& k, const float* source, u64* table, int groups) {
    u32 best = 0, best_id = 0;
    for_each<8>(k, source, [&](int id, float v) {
        const u32 order = order_of(v);
        if (order > best) best = order, best_id = id;  // ids rise: a tie keeps the lower one
    });
    const u64 key = warp_max_u64(best ? key_of(best, best_id) : 0);
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
    for_each<8>(k, source, [&](int id, float v) {
        const u64 key = key_of(order_of(v), id);
        if (key >= bound) {
            const u32 at = atomicAdd(count, 1u);
            if (at < CANDIDATES) list[at] = key;
        }
    });
}

// Adds a token's mass to two 32-bit words: hardware adds those in shared memory, 64-bit ones it loops over.
DEVICE void add_to_bin(u32* low, u32* high, u32 bin, u64 mass) {
    const u32 part = (u32)mass;
    const u32 old = atomicAdd(low + bin, part);
    const u32 carry = (u32)(mass >> 32) + (old + part < old);
    if (carry) atomicAdd(high + bin, carry);
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

// ---- selection without sorting everything -------------------------------------------------------------------------
enum Target { COUNT, SHARE, DRAW };

// What select() looks for: the wanted-th token (COUNT), the one at which the running mass reaches the share p (SHARE),
// the one the random number falls on (DRAW); in order of key, or of typical_key.
struct Query {
    Target target;
    bool by_typical;
    float p;
    u32 number;
};

// Whether a token counts; then its place in the order (digits), its mass and its bin of the first histogram. Bins are
// linear in the logit, 73 to a unit, and go down with the order; what is 28 below the largest shares the last one.
DEVICE bool examine(const View& view, const Query& query, int id, float v, u64* digits, u64* q, u32* bin) {
    const u64 key = key_of(order_of(v), id);
    if (key < view.cut) return false;
    float x = distance(v, view.largest, view.temperature);
    *digits = key;
    *q = 1;
    if (query.target != COUNT) {
        const float weight = exponential(x);
        if (weight < view.least_weight) return false;
        *q = fixed_point(weight);
        if (*q == 0) return false;
        if (view.typical || query.by_typical) {
            const u64 other = typical_key(x, view.mean, id);
            if (view.typical && other < view.typical_cut) return false;
            if (query.by_typical) {
                *digits = other;
                x = -fabsf(__fsub_rn(x, view.mean));
            }
        }
    }
    *bin = x < -28.0f ? 0 : BINS - 1 - (u32)__fmul_rn(-x, 73.0f);
    return true;
}

DEVICE void clear_bins(Block& k) {  // this block's, and the row's for the pass after the next meeting
    u32* words = (u32*)k.s->pool;
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) words[i] = 0;
    if (blockIdx.x == 0) {  // last read before the previous meeting
        u64* next = k.a->histograms + ((size_t)k.b * 3 + (k.passes + 1) % 3) * BINS;
        for (int i = threadIdx.x; i < BINS; i += THREADS) next[i] = 0;
    }
    __syncthreads();
}

// Adds up the blocks' bins, then finds the bin, from the top, where the running sum exceeds *rest and leaves in *rest
// what is to be found inside it. The first pass works *rest out of the query and the total.
DEVICE u32 merge_bins(Block& k, const Query& query, bool first, u64* rest) {
    Shared* s = k.s;
    const u32* low = (const u32*)s->pool;
    const u32* high = low + BINS;
    u64* table = k.a->histograms + ((size_t)k.b * 3 + k.passes % 3) * BINS;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        const u64 sum = ((u64)high[i] << 32) + low[i];
        if (sum) atomicAdd(table + i, sum);
    }
    row_meet(k);
    ++k.passes;
    u64 bins[BINS / THREADS], sum = 0, total;
    const int top = BINS - 1 - (int)threadIdx.x * (BINS / THREADS);
#pragma unroll
    for (int j = 0; j < BINS / THREADS; ++j) sum += bins[j] = load_l2(table + top - j);
    u64 before = block_scan(s, sum, &total);
    if (first) {
        *rest = query.target == COUNT   ? query.number - 1
                : query.target == SHARE ? share(query.p, total) - 1
                                        : share_random(query.number, total);
    }
    if (before <= *rest && *rest < before + sum) {
#pragma unroll
        for (int j = 0; j < BINS / THREADS; ++j) {
            if (before <= *rest && *rest < before + bins[j]) {
                s->found = (u64)(top - j);
                s->found_rest = *rest - before;
            }
            before += bins[j];
        }
    }
    __syncthreads();
    const u32 bin = (u32)s->found;
    *rest = s->found_rest;
    __syncthreads();
    return bin;
}

// Digits of the first token, in the query's order, at which the running sum exceeds the target. All blocks of the row
// take part and get the same answer.
static __device__ __noinline__ u64 select(Block& k, const View& view, const Query query) {
    Shared* s = k.s;
    u32* low = (u32*)s->pool;
    u32* high = low + BINS;
    u64* list = k.a->candidates + (size_t)k.b * 2 * CANDIDATES;
    u32* count = k.control->counts + 4 + k.selects++;
    u64 rest = 0;

    clear_bins(k);
    for_each<4>(k, view.source, [&](int id, float v) {
        u64 digits, q;
        u32 bin;
        if (examine(view, query, id, v, &digits, &q, &bin)) add_to_bin(low, high, bin, q);
    });
    const u32 chosen = merge_bins(k, query, true, &rest);
    for_each<4>(k, view.source, [&](int id, float v) {
        u64 digits, q;
        u32 bin;
        if (examine(view, query, id, v, &digits, &q, &bin) && bin == chosen) {
            const u32 at = atomicAdd(count, 1u);
            if (at < CANDIDATES) list[at] = digits;
        }
    });
    row_meet(k);
    const int n = (int)load_acquire(count);
    if (n <= CANDIDATES) {
        sort_candidates(s, list, n, n);
        const u64* sorted = s->pool + CANDIDATES;
        const int per = (n + THREADS - 1) / THREADS, first = threadIdx.x * per;
        auto mass = [&](int i) -> u64 {
            if (query.target == COUNT) return 1;
            float v;
            asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(view.source + id_of(sorted[i])));
            return fixed_point(exponential(distance(v, view.largest, view.temperature)));
        };
        u64 q[CANDIDATES / THREADS], sum = 0, total;
#pragma unroll
        for (int j = 0; j < CANDIDATES / THREADS; ++j) {
            q[j] = j < per && first + j < n ? mass(first + j) : 0;
            sum += q[j];
        }
        u64 before = block_scan(s, sum, &total);
#pragma unroll
        for (int j = 0; j < CANDIDATES / THREADS; ++j) {
            if (before <= rest && rest < before + q[j]) s->found = sorted[first + j];
            before += q[j];
        }
        __syncthreads();
        const u64 found = s->found;
        __syncthreads();
        return found;
    }

    u64 prefix = 0;
    const int shifts[5] = {53, 42, 32, 11, 0};  // the low word of a key holds 22 bits
    for (int pass = 0; pass < 5; ++pass) {
        const int shift = shifts[pass], width = pass == 2 ? 10 : 11, above = shift + width;
        clear_bins(k);
        for_each<4>(k, view.source, [&](int id, float v) {
            u64 digits, q;
            u32 bin;
            if (!examine(view, query, id, v, &digits, &q, &bin) || bin != chosen) return;
            if (above < 64 && ((digits ^ prefix) >> above) != 0) return;
            add_to_bin(low, high, (u32)(digits >> shift) & ((1u << width) - 1), q);
        });
        prefix |= (u64)merge_bins(k, query, false, &rest) << shift;
    }
    return prefix;
}

// ---- steps of a row ----------------------------------------------------------------------------------------------
// Steps 5 to 8 on n sorted candidates; returns the key drawn.
DEVICE u64 draw_sorted(Shared* s, int n, float largest, u32 random) {
    const SamplingRow& row = s->row;
    constexpr int MOST = CANDIDATES / THREADS;
    u64* keys = s->pool;
    u64* sorted = s->pool + CANDIDATES;
    u64* mass = s->pool + 2 * CANDIDATES;
    const int per = (n + THREADS - 1) / THREADS, first = threadIdx.x * per;
    float x[MOST], w[MOST];
    u64 q[MOST], total;
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
        x[j] = 0.0f, w[j] = -1.0f, q[j] = 0;
        if (j < per && first + j < n) {
            x[j] = distance(value_of(sorted[first + j]), largest, row.temperature);
            w[j] = exponential(x[j]);
            q[j] = fixed_point(w[j]);
        }
    }
    auto sum = [&]() {
        u64 v = 0;
#pragma unroll
        for (int j = 0; j < MOST; ++j) v += q[j];
        return v;
    };
    if (row.typical_p < 1.0f) {
        u64 down = 0, down_total;
#pragma unroll
        for (int j = 0; j < MOST; ++j) down += downward_of(x[j], w[j], q[j]);
        block_scan(s, down, &down_total);
        block_scan(s, sum(), &total);
        const float mean = typical_mean(down_total, total);
        int rank[MOST];
#pragma unroll
        for (int j = 0; j < MOST; ++j)
            if (j < per && first + j < n) keys[first + j] = typical_key(x[j], mean, id_of(sorted[first + j]));
        __syncthreads();
#pragma unroll
        for (int j = 0; j < MOST; ++j) {
            rank[j] = 0;
            if (j < per && first + j < n) {
                for (int i = 0; i < n; ++i) rank[j] += keys[i] > keys[first + j];
                mass[rank[j]] = q[j];
            }
        }
        __syncthreads();
        u64 v = 0;
        for (int j = 0; j < per; ++j)
            if (first + j < n) v += mass[first + j];
        u64 before = block_scan(s, v, &total);
        for (int j = 0; j < per; ++j)
            if (first + j < n) {
                const u64 m = mass[first + j];
                mass[first + j] = before;
                before += m;
            }
        __syncthreads();
        const u64 wanted = share(row.typical_p, total);
#pragma unroll
        for (int j = 0; j < MOST; ++j)
            if (j < per && first + j < n && mass[rank[j]] >= wanted) w[j] = -1.0f, q[j] = 0;
    }
    if (row.top_p < 1.0f) {
        u64 before = block_scan(s, sum(), &total);
        const u64 wanted = share(row.top_p, total);
#pragma unroll
        for (int j = 0; j < MOST; ++j) {
            const u64 own = q[j];
            if (before >= wanted) w[j] = -1.0f, q[j] = 0;
            before += own;
        }
    }
    if (row.min_p > 0.0f) {
        float best = -1.0f;
#pragma unroll
        for (int j = 0; j < MOST; ++j) best = fmaxf(best, w[j]);
        best = __uint_as_float((u32)block_max_u64(s, best > 0.0f ? __float_as_uint(best) : 0));
        const float least = __fmul_rn(best, row.min_p);
#pragma unroll
        for (int j = 0; j < MOST; ++j)
            if (w[j] < least) q[j] = 0;
    }
    u64 before = block_scan(s, sum(), &total);
    const u64 point = share_random(random, total);
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
        if (before <= point && point < before + q[j]) s->found = sorted[first + j];
        before += q[j];
    }
    __syncthreads();
    return s->found;
}

// Bias and penalties of this block's tokens, into a.adjusted.
DEVICE void adjust(Block& k, const float* raw, float* adjusted, bool penalize) {
    const Arguments& a = *k.a;
    const SamplingRow& row = k.s->row;
    u32* counts = (u32*)k.s->pool;
    float* bias = (float*)(counts + BINS);
    const int length = k.s->position + 1;
    const int from = row.penalty_last_n < 0 || row.penalty_last_n > length ? 0 : length - row.penalty_last_n;
    const int* history = a.history + (size_t)k.s->slot * a.context;
    for (int tile = k.lo; tile < k.hi; tile += BINS) {
        const u32 width = min(BINS, k.hi - tile);
        for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) counts[i] = 0;
        __syncthreads();
        if (penalize)
            for (int i = from + threadIdx.x; i < length; i += THREADS) {
                const u32 at = (u32)(history[i] - tile);
                if (at < width) atomicAdd(counts + at, 1u);
            }
        for (int i = threadIdx.x; i < row.n_bias; i += THREADS) {
            const size_t entry = (size_t)k.s->slot * a.bias_stride + i;
            const u32 at = (u32)(a.bias_ids[entry] - tile);
            if (at < width) bias[at] = a.bias_values[entry];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < width; i += THREADS) {
            float v = __fadd_rn(raw[tile + i], bias[i]);
            const u32 count = counts[i];
            if (count) {
                v = v > 0.0f ? __fdiv_rn(v, row.repetition_penalty) : __fmul_rn(v, row.repetition_penalty);
                const float lower = __fadd_rn(__fmul_rn((float)count, row.frequency_penalty), row.presence_penalty);
                v = __fsub_rn(v, lower);
            }
            adjusted[tile + i] = v;
        }
        __syncthreads();
    }
}

// Row done: the token goes to the next step, the history and the ring. One thread. key 0: no usable logits.
DEVICE void hand_over(Block& k, u64 key) {
    const Arguments& a = *k.a;
    const int b = k.b, token = key ? id_of(key) : -1, position = k.s->position + 1;
    a.next_token[b] = token;
    a.out_tokens[(size_t)k.s->ring_row * a.most_rows + b] = token;
    if (key && position < a.context) {
        a.history[(size_t)k.s->slot * a.context + position] = token;
        a.positions[b] = position;
    } else {
        a.positions[b] = -1;  // nothing more can be fed: the row becomes padding
    }
    a.rows[k.s->slot].output_index = k.s->row.output_index + 1;
    if (k.s->row.n_logprobs >= 0 && key) {
        float* out = a.out_logprobs + (size_t)k.s->ring_row * a.most_rows + b;
        const float largest = value_of(k.s->found_rest);  // put there by the caller
        const float log_total = (float)log(__dmul_rn((double)load_l2(&k.control->raw_mass), 0x1p-40));
        *out = __fsub_rn(__fsub_rn(a.logits[(size_t)b * a.V + token], largest), log_total);
    }
}

DEVICE void step_done(const Arguments& a) {  // one thread of a row
    __threadfence();
    if (atomicAdd(a.step + 1, 1u) == (u32)a.B - 1) {
        a.step[1] = 0;
        a.step[0] += 1;
    }
}

// This block is through with the row; true for the last one to say so.
DEVICE bool leave(Block& k) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        k.s->flag = atomicAdd(&k.control->left, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return k.s->flag;
}

DEVICE void clean_up(Block& k) {  // the last block: everything zero for the next launch
    u64* tables = k.a->histograms + (size_t)k.b * 3 * BINS;
    if (k.passes)
        for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) tables[i] = 0;
    __syncthreads();
    if (threadIdx.x < sizeof(Control) / 4) ((u32*)k.control)[threadIdx.x] = 0;
    if (threadIdx.x == 0) step_done(*k.a);
}

// Log-softmax of the raw logits: total mass in control->raw_mass, the n best into the ring. Returns the largest key.
DEVICE u64 report_logprobs(Block& k, const float* raw, int groups) {
    const Arguments& a = *k.a;
    const int n = min(k.s->row.n_logprobs, a.V);
    u64* table = a.maxima + ((size_t)k.b * 2 + 1) * MAXIMA;
    u64* list = a.candidates + ((size_t)k.b * 2 + 1) * CANDIDATES;
    publish_maxima(k, raw, table, groups);
    row_meet(k);
    u64 bound, total;
    const u64 best = read_maxima(k, table, groups, max(n, 1), &bound);
    if (!usable(best)) return best;
    const float largest = value_of(best);
    u64 mass = 0;
    for_each<4>(k, raw, [&](int, float v) { mass += fixed_point(exponential(__fsub_rn(v, largest))); });
    block_scan(k.s, mass, &total);
    if (threadIdx.x == 0) atomicAdd(&k.control->raw_mass, total);
    if (n > 0) gather(k, raw, bound, list, k.control->counts + 0);
    row_meet(k);
    if (n == 0) return best;
    u32 count = load_acquire(k.control->counts + 0);
    if (count > CANDIDATES) {
        View view = {raw, largest, 1.0f, 0, false, 0.0f, 0, -1.0f};
        bound = select(k, view, {COUNT, false, 0.0f, (u32)n});
        gather(k, raw, bound, list, k.control->counts + 1);
        row_meet(k);
        count = load_acquire(k.control->counts + 1);
    }
    if (blockIdx.x == 0) {
        sort_candidates(k.s, list, count, n);
        const float log_total = (float)log(__dmul_rn((double)load_l2(&k.control->raw_mass), 0x1p-40));
        if (threadIdx.x < n) {
            const size_t at = ((size_t)k.s->ring_row * a.most_rows + k.b) * TOP_LOGPROBS + threadIdx.x;
            const u64 key = k.s->pool[CANDIDATES + threadIdx.x];
            a.out_top_ids[at] = id_of(key);
            a.out_top_logprobs[at] = __fsub_rn(__fsub_rn(value_of(key), largest), log_total);
        }
        __syncthreads();
    }
    return best;
}

// Steps 4 to 8 where sorting would be too long: cutoffs by select().
DEVICE u64 choose_by_cutoffs(Block& k, const float* source, u64 best, u32 random) {
    const SamplingRow& row = k.s->row;
    View view = {source, value_of(best), row.temperature, 0, false, 0.0f, 0, -1.0f};
    if (row.top_k > 0 && row.top_k < k.a->V) view.cut = select(k, view, {COUNT, false, 0.0f, (u32)row.top_k});
    float heaviest = 1.0f;
    if (row.typical_p < 1.0f) {
        u64 mass = 0, down = 0, total, down_total;
        for_each<4>(k, source, [&](int id, float v) {
            if (key_of(order_of(v), id) < view.cut) return;
            const float x = distance(v, view.largest, view.temperature), weight = exponential(x);
            const u64 q = fixed_point(weight);
            mass += q;
            down += downward_of(x, weight, q);
        });
        block_scan(k.s, mass, &total);
        block_scan(k.s, down, &down_total);
        if (threadIdx.x == 0) {
            atomicAdd(&k.control->mass, total);
            atomicAdd(&k.control->downward, down_total);
        }
        row_meet(k);
        view.mean = typical_mean(load_l2(&k.control->downward), load_l2(&k.control->mass));
        view.typical_cut = select(k, view, {SHARE, true, row.typical_p, 0});
        view.typical = true;
        u64 first = 0;
        for_each<4>(k, source, [&](int id, float v) {
            const u64 key = key_of(order_of(v), id);
            const float x = distance(v, view.largest, view.temperature);
            if (key >= view.cut && typical_key(x, view.mean, id) >= view.typical_cut && key > first) first = key;
        });
        first = block_max_u64(k.s, first);
        if (threadIdx.x == 0) atomicMax(&k.control->best, first);
        row_meet(k);
        heaviest = exponential(distance(value_of(load_l2(&k.control->best)), view.largest, view.temperature));
    }
    if (row.top_p < 1.0f) {
        const u64 cut = select(k, view, {SHARE, false, row.top_p, 0});
        if (cut > view.cut) view.cut = cut;
    }
    if (row.min_p > 0.0f) view.least_weight = __fmul_rn(heaviest, row.min_p);
    return select(k, view, {DRAW, false, 0.0f, random});
}

DEVICE void sample_row(Block& k, int groups) {
    const Arguments& a = *k.a;
    const SamplingRow& row = k.s->row;
    const float* raw = a.logits + (size_t)k.b * a.V;
    const float* source = raw;
    u64* table = a.maxima + (size_t)k.b * 2 * MAXIMA;
    u64* list = a.candidates + (size_t)k.b * 2 * CANDIDATES;
    const bool penalize = row.penalty_last_n != 0 &&
                          (row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f);
    u64 raw_best = 0, chosen = 0, bound;
    if (row.n_logprobs >= 0) {
        raw_best = report_logprobs(k, raw, groups);
        if (!usable(raw_best)) {
            if (blockIdx.x == 0 && threadIdx.x == 0) hand_over(k, 0);
            if (leave(k)) clean_up(k);
            return;
        }
    }
    if (penalize || row.n_bias > 0) {
        float* adjusted = a.adjusted + (size_t)k.b * a.V;
        adjust(k, raw, adjusted, penalize);
        source = adjusted;
    }
    publish_maxima(k, source, table, groups);
    if (row.temperature == 0.0f || row.top_k == 1) {
        if (!leave(k)) return;
        const u64 best = block_max_u64(k.s, threadIdx.x < gridDim.x * groups ? load_l2(table + threadIdx.x) : 0);
        if (threadIdx.x == 0) {
            k.s->found_rest = raw_best;
            hand_over(k, usable(best) ? best : 0);
        }
        clean_up(k);
        return;
    }
    row_meet(k);
    const bool sorts = row.top_k > 0 && row.top_k <= CANDIDATES && row.top_k < a.V;
    const u64 best = read_maxima(k, table, groups, sorts ? row.top_k : 1, &bound);
    const u32 random = uniform24(row.seed_low, row.seed_high, row.output_index);
    if (usable(best)) {
        if (sorts) {
            u32 count = CANDIDATES + 1;
            if (bound) {
                gather(k, source, bound, list, k.control->counts + 2);
                row_meet(k);
                count = load_acquire(k.control->counts + 2);
            }
            if (count > CANDIDATES) {
                View view = {source, value_of(best), row.temperature, 0, false, 0.0f, 0, -1.0f};
                bound = select(k, view, {COUNT, false, 0.0f, (u32)row.top_k});
                gather(k, source, bound, list, k.control->counts + 3);
                row_meet(k);
                count = load_acquire(k.control->counts + 3);
            }
            if (blockIdx.x == 0) {
                const int n = sort_candidates(k.s, list, count, row.top_k);
                chosen = draw_sorted(k.s, n, value_of(best), random);
            }
        } else {
            chosen = choose_by_cutoffs(k, source, best, random);
        }
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        k.s->found_rest = raw_best;
        hand_over(k, chosen);
    }
    if (leave(k)) clean_up(k);
}

// logits … candidates: see Arguments.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample(const float* logits, int V, int B, const int* slots, SamplingRow* rows, const int* bias_ids,
           const float* bias_values, int bias_stride, int* history, int context, int* next_token, int* positions,
           u32* step, int ring, int most_rows, int* out_tokens, float* out_logprobs, int* out_top_ids,
           float* out_top_logprobs, float* adjusted, u64* maxima, Control* control, u64* histograms, u64* candidates) {
    __shared__ __align__(16) Shared s;
    const Arguments a = {logits,     V,         B,         slots,        rows,       bias_ids,     bias_values,
                         bias_stride, history,  context,   next_token,   positions,  step,         ring,
                         most_rows,  out_tokens, out_logprobs, out_top_ids, out_top_logprobs, adjusted, maxima,
                         control,    histograms, candidates};
    pdl_launch();
    pdl_wait();
    // Parts of a block with a maximum of their own, 128 in a row where the grid has 16 blocks or more.
    const int groups = min(WARPS, max(1, MAXIMA / (int)gridDim.x));
    const int span = ((a.V + (int)gridDim.x - 1) / (int)gridDim.x + 31) & ~31;
    for (int b = blockIdx.y; b < a.B; b += gridDim.y) {
        __syncthreads();
        if (threadIdx.x == 0) s.slot = a.slots ? a.slots[b] : b;
        if (threadIdx.x == 32) s.position = a.positions[b];
        if (threadIdx.x == 64) s.ring_row = a.step[0] % (u32)a.ring;
        __syncthreads();
        if (s.slot < 0 || s.position < 0) {
            if (blockIdx.x == 0 && threadIdx.x == 0) {
                a.out_tokens[(size_t)s.ring_row * a.most_rows + b] = -1;
                step_done(a);
            }
            continue;
        }
        if (threadIdx.x < sizeof(SamplingRow) / 4)
            ((u32*)&s.row)[threadIdx.x] = ((const u32*)(a.rows + s.slot))[threadIdx.x];
        __syncthreads();
        const int lo = min(a.V, (int)blockIdx.x * span);
        Block k = {&a, &s, b, lo, min(a.V, lo + span), 0, 0, 0, a.control + b};
        sample_row(k, groups);
    }
}
