// sample, sample_masked: the next token of B rows of logits, in one kernel; bit for bit what engine/sampling/sampler.py chooses.
//
// Grid (G, R): G blocks share a row through global memory, R rows run at once, further rows follow. All blocks must be
// resident together (the launcher keeps G * R at or below the number of multiprocessors), for rows that need more than
// an argmax meet at row_meet(). Every sum is an integer sum, so the order in which blocks and threads add is immaterial.
//   greedy           block maxima, the last block to leave takes the largest
//   top_k <= 1024    k-th largest of 128 partial maxima = lower bound; gather what reaches it; block 0 sorts and draws
//   everything else  cutoffs by select(): a histogram of mass or count over the logits, then a sort of the one bin that
//                    holds the answer, or, where that bin is too full (ties), further histograms digit by digit
// Joined behind sampling_common.cuh and sampling_select.cuh.

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

DEVICE bool allowed(const u32* mask, int id) { return mask[id >> 5] >> (id & 31) & 1; }
DEVICE const u32* mask_of(const Arguments& a, const Shared& s) { return a.masks + (size_t)s.slot * a.mask_stride; }

// Takes this block's tokens that the row's mask does not allow out of its logits, and out of what was read of them.
DEVICE void apply_mask(const Arguments& a, const Block& k, float* preloaded) {
    const u32* mask = mask_of(a, *k.s);
    float* logits = a.logits + (size_t)k.b * a.V;
#pragma unroll
    for (int j = 0; j < PRELOADED; ++j) {
        const int id = k.lo + (int)threadIdx.x + j * THREADS;
        if (id < k.hi && !allowed(mask, id)) preloaded[j] = __uint_as_float(0xff800000u);
    }
    for (int id = k.lo + threadIdx.x; id < k.hi; id += THREADS)
        if (!allowed(mask, id)) logits[id] = __uint_as_float(0xff800000u);
    __syncthreads();  // blocks read their own share of a row only
}

// Bias and penalties of this block's tokens, and the mask where `mask` is one, into a.adjusted.
DEVICE void adjust(const Arguments& a, Block& k, const float* raw, float* adjusted, bool penalize, const u32* mask) {
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
            adjusted[tile + i] = mask == nullptr || allowed(mask, tile + i) ? v : __uint_as_float(0xff800000u);
        }
        __syncthreads();
    }
}

// Row done: the token goes to the next step, the history and the ring. One thread. key 0: no usable logits.
DEVICE void hand_over(const Arguments& a, Block& k, u64 key) {
    const int b = k.b, slot = k.s->slot, token = key ? id_of(key) : -1, position = k.s->position + 1;
    a.next_token[slot] = token;
    a.out_tokens[(size_t)k.s->ring_row * a.most_rows + b] = token;
    if (key && position < a.context) a.history[(size_t)slot * a.context + position] = token;
    // Where nothing more can be fed the row becomes padding.
    a.positions[slot] = key && position < min(a.context, k.s->row.limit) ? position : -1;
    a.rows[slot].output_index = k.s->row.output_index + 1;
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

DEVICE void clean_up(const Arguments& a, Block& k) {  // the last block: everything zero for the next launch
    if (k.passes)
        for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) k.histograms[i] = 0;
    __syncthreads();
    if (threadIdx.x < sizeof(Control) / 4) ((u32*)k.control)[threadIdx.x] = 0;
    if (threadIdx.x == 0) step_done(a);
}

// Log-softmax of the raw logits: total mass in control->raw_mass, the n best into the ring. Returns the largest key.
DEVICE u64 report_logprobs(const Arguments& a, Block& k, const float* raw, const float* preloaded, int groups) {
    const int n = min(k.s->row.n_logprobs, a.V);
    u64* table = a.maxima + ((size_t)k.b * 2 + 1) * MAXIMA;
    u64* list = a.candidates + ((size_t)k.b * 3 + 1) * CANDIDATES;
    publish_maxima(k, raw, preloaded, table, groups);
    row_meet(k);
    u64 bound, total;
    const u64 best = read_maxima(k, table, groups, max(n, 1), &bound);
    if (!usable(best)) return best;
    const float largest = value_of(best);
    u64 mass = 0;
    for_each<2>(k, raw, [&](int, float v) { mass += fixed_point(exponential(__fsub_rn(v, largest))); });
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
DEVICE u64 choose_by_cutoffs(const Arguments& a, Block& k, const float* source, u64 best, u32 random) {
    const SamplingRow& row = k.s->row;
    View view = {source, value_of(best), row.temperature, 0, false, 0.0f, 0, -1.0f};
    if (row.top_k > 0 && row.top_k < a.V) view.cut = select(k, view, {COUNT, false, 0.0f, (u32)row.top_k});
    float heaviest = 1.0f;
    if (row.typical_p < 1.0f) {
        u64 mass = 0, down = 0, total, down_total;
        for_each<2>(k, source, [&](int id, float v) {
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
        for_each<2>(k, source, [&](int id, float v) {
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

template <bool MASKED>
DEVICE void sample_row(const Arguments& a, Block& k, const float* preloaded, int groups) {
    const SamplingRow& row = k.s->row;
    const float* raw = a.logits + (size_t)k.b * a.V;
    const float* source = raw;
    u64* table = a.maxima + (size_t)k.b * 2 * MAXIMA;
    u64* list = a.candidates + (size_t)k.b * 3 * CANDIDATES;
    const bool penalize = row.penalty_last_n != 0 &&
                          (row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f);
    u64 raw_best = 0, chosen = 0, bound;
    if (row.n_logprobs >= 0) {
        raw_best = report_logprobs(a, k, raw, preloaded, groups);
        if (!usable(raw_best)) {
            if (blockIdx.x == 0 && threadIdx.x == 0) hand_over(a, k, 0);
            if (leave(k)) clean_up(a, k);
            return;
        }
    }
    // The log-probabilities of such a row are those of the logits without its mask, so the mask comes here.
    const u32* mask = MASKED && row.mask == MASK_FREE_LOGPROBS ? mask_of(a, *k.s) : nullptr;
    if (penalize || row.n_bias > 0 || mask != nullptr) {
        float* adjusted = a.adjusted + (size_t)k.b * a.V;
        adjust(a, k, raw, adjusted, penalize, mask);
        source = adjusted;
        publish_maxima(k, source, nullptr, table, groups);
    } else {
        publish_maxima(k, source, preloaded, table, groups);
    }
    if (row.temperature == 0.0f || row.top_k == 1) {
        if (!leave(k)) return;
        const u64 best = block_max_u64(k.s, threadIdx.x < gridDim.x * groups ? load_l2(table + threadIdx.x) : 0);
        if (threadIdx.x == 0) {
            k.s->found_rest = raw_best;
            hand_over(a, k, usable(best) ? best : 0);
        }
        clean_up(a, k);
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
            chosen = choose_by_cutoffs(a, k, source, best, random);
        }
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        k.s->found_rest = raw_best;
        hand_over(a, k, chosen);
    }
    if (leave(k)) clean_up(a, k);
}

template <bool MASKED>
DEVICE void sample_rows(const Arguments& a) {
    __shared__ __align__(16) Shared s;
    pdl_launch();
    pdl_wait();
    const int groups = MAXIMA / (int)gridDim.x;  // parts of a block with a maximum of their own: 128 in a row
    const int span = ((a.V + (int)gridDim.x - 1) / (int)gridDim.x + 31) & ~31;
    for (int b = blockIdx.y; b < a.B; b += gridDim.y) {
        const int lo = min(a.V, (int)blockIdx.x * span);
        Block k = {&s, a.control + b, a.histograms + (size_t)b * 3 * BINS, a.candidates + ((size_t)b * 3 + 2) * CANDIDATES,
                   b,  lo,            min(a.V, lo + span),                 (a.V & 3) == 0, 0, 0, 0};
        float preloaded[PRELOADED];  // on their way while the settings are read
        const float* first = a.logits + (size_t)b * a.V + lo + threadIdx.x;
#pragma unroll
        for (int j = 0; j < PRELOADED; ++j)
            preloaded[j] = lo + (int)threadIdx.x + j * THREADS < k.hi ? first[j * THREADS] : 0.0f;
        __syncthreads();  // the row before is done with s
        if (threadIdx.x < sizeof(SamplingRow) / 4) {
            const int slot = a.slots ? a.slots[b] : b;
            if (slot >= 0) ((u32*)&s.row)[threadIdx.x] = ((const u32*)(a.rows + slot))[threadIdx.x];
            if (threadIdx.x == 0) s.slot = slot, s.position = slot >= 0 ? a.positions[slot] : -1;
        }
        if (threadIdx.x == 64) s.ring_row = a.step[0] % (u32)a.ring;
        __syncthreads();
        if (s.slot < 0 || s.position < 0) {
            if (blockIdx.x == 0 && threadIdx.x == 0) {
                a.out_tokens[(size_t)s.ring_row * a.most_rows + b] = -1;
                step_done(a);
            }
            continue;
        }
        if (MASKED && s.row.mask == MASK) apply_mask(a, k, preloaded);
        sample_row<MASKED>(a, k, preloaded, groups);
    }
}

// Of both kernels; see Arguments.
#define PARAMETERS                                                                                                      \
    float *logits, int V, int B, const int *slots, SamplingRow *rows, const int *bias_ids, const float *bias_values,    \
        int bias_stride, int *history, int context, int *next_token, int *positions, u32 *step, int ring, int most_rows, \
        int *out_tokens, float *out_logprobs, int *out_top_ids, float *out_top_logprobs, float *adjusted, u64 *maxima,  \
        Control *control, u64 *histograms, u64 *candidates, const u32 *masks, int mask_stride
#define ARGUMENTS                                                                                                       \
    {logits,      V,       B,          slots,        rows,        bias_ids,         bias_values, bias_stride,           \
     history,     context, next_token, positions,    step,        ring,             most_rows,   out_tokens,            \
     out_logprobs, out_top_ids, out_top_logprobs, adjusted, maxima, control,        histograms,  candidates,            \
     masks,       mask_stride}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 512 ? 1 : 2) sample(PARAMETERS) {  // no row has a mask
    const Arguments a = ARGUMENTS;
    sample_rows<false>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 512 ? 1 : 2) sample_masked(PARAMETERS) {  // some may have
    const Arguments a = ARGUMENTS;
    sample_rows<true>(a);
}
