// Finds a token in the order of the candidates without sorting them: by count, by share of the mass, by random number.
// A histogram over the logits leads to one bin, and only that is sorted; a bin too full for that (ties) is split
// further, digit by digit.

// Adds a token's mass to two 32-bit words: hardware adds those in shared memory, 64-bit ones it loops over.
DEVICE void add_to_bin(u32* low, u32* high, u32 bin, u64 mass) {
    const u32 part = (u32)mass;
    const u32 old = atomicAdd(low + bin, part);
    const u32 carry = (u32)(mass >> 32) + (old + part < old);
    if (carry) atomicAdd(high + bin, carry);
}

enum Target { COUNT, SHARE, DRAW };

// What select() looks for: the wanted-th token (COUNT), the one at which the running mass reaches the share p (SHARE),
// the one the random number falls on (DRAW); in order of key, or of typical_key.
struct Query {
    Target target;
    bool by_typical;
    float p;
    u32 number;
};

// Bins are linear in the logit, 73 to a unit, and go down with the order; what is 28 below the largest shares the last one.
DEVICE u32 bin_of(float x) { return x < -28.0f ? 0 : BINS - 1 - (u32)__fmul_rn(-x, 73.0f); }

constexpr u32 ANY_BIN = BINS;

// Whether a token counts, and is in a bin of the first histogram; then its place in the order (digits), its mass and its
// bin. Most tokens are not in the bin: those need no weight.
DEVICE bool examine(const View& view, const Query& query, u32 wanted, int id, float v, u64* digits, u64* q, u32* bin) {
    const u64 key = key_of(order_of(v), id);
    if (key < view.cut) return false;
    float x = distance(v, view.largest, view.temperature);
    *digits = key;
    *q = 1;
    *bin = bin_of(x);
    if (!query.by_typical && wanted != ANY_BIN && *bin != wanted) return false;
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
                *bin = bin_of(-fabsf(__fsub_rn(x, view.mean)));
            }
        }
    }
    return wanted == ANY_BIN || *bin == wanted;
}

DEVICE void clear_bins(Block& k) {  // this block's, and the row's for the pass after the next meeting
    u32* words = (u32*)k.s->pool;
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) words[i] = 0;
    if (blockIdx.x == 0) {  // last read before the previous meeting
        u64* next = k.histograms + (k.passes + 1) % 3 * BINS;
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
    u64* table = k.histograms + k.passes % 3 * BINS;
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

DEVICE u64 select_inline(Block& k, const View& view, const Query& query) {
    Shared* s = k.s;
    u32* low = (u32*)s->pool;
    u32* high = low + BINS;
    u64* list = k.selected;
    u32* count = k.control->counts + 4 + k.selects++;
    u64 rest = 0;

    clear_bins(k);
    for_each<2>(k, view.source, [&](int id, float v) {
        u64 digits, q;
        u32 bin;
        if (examine(view, query, ANY_BIN, id, v, &digits, &q, &bin)) add_to_bin(low, high, bin, q);
    });
    const u32 chosen = merge_bins(k, query, true, &rest);
    for_each<2>(k, view.source, [&](int id, float v) {
        u64 digits, q;
        u32 bin;
        if (examine(view, query, chosen, id, v, &digits, &q, &bin)) {
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
        for_each<2>(k, view.source, [&](int id, float v) {
            u64 digits, q;
            u32 bin;
            if (!examine(view, query, chosen, id, v, &digits, &q, &bin)) return;
            if (above < 64 && ((digits ^ prefix) >> above) != 0) return;
            add_to_bin(low, high, (u32)(digits >> shift) & ((1u << width) - 1), q);
        });
        prefix |= (u64)merge_bins(k, query, false, &rest) << shift;
    }
    return prefix;
}

struct Selected {
    u64 digits;
    u32 meetings, passes, selects;
};

// One copy for all its callers, with everything by value: an address taken would force the caller's registers to memory.
static __device__ __noinline__ Selected select_call(Block k, View view, Query query) {
    const u64 digits = select_inline(k, view, query);
    return {digits, k.meetings, k.passes, k.selects};
}

// Digits of the first token, in the query's order, at which the running sum exceeds the target. All blocks of the row
// take part and get the same answer.
DEVICE u64 select(Block& k, const View& view, const Query& query) {
    const Selected found = select_call(k, view, query);
    k.meetings = found.meetings;
    k.passes = found.passes;
    k.selects = found.selects;
    return found.digits;
}
