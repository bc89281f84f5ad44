// Decode attention: one new token per sequence. QK-norm, RoPE, cache append, softmax over the paged cache.
//
// grid (KV_HEADS * head tiles, Y), DECODE_WARPS warps. A block serves up to HEAD_TILE query heads of one cache head over
// a run of ranges of positions (attention_ranges.cuh); the next range's keys and values are fetched while it computes. A
// row whose ranges are all in one block is finished there; of others every range leaves a partial sum, and the last block
// to finish adds them up. Either way the ranges are added in their order with the same instructions: the same bits on
// every run, whatever else is in the batch and however many blocks there are. With ONE_RANGE, which needs N_SPLITS slots
// a row, likewise.
// qkv float32 [B][ROW_WIDTH]; block_table int32 [B][max_pages], -1 = no page: not read, and the new token is not
// appended; positions int32 [B], -1 (or behind the table) = padded row, nothing written;
// partial float32 [columns][slots][MOST_HEADS][VALUE_DIM]; partial_max_sum float2 [columns][slots][MOST_HEADS];
// counters int32 [B][columns], zero before and after; out float32 [B][HEADS*VALUE_DIM]. With LEAVES_OPERAND, and unless
// operand is null, the rows also go there as decode_gemm.cu reads them, for operand_groups groups of 8 rows; the heads of a
// block are then whole operands of 256 columns.
// Few ranges leave most of the card idle: then HEAD_PARTS blocks, PART_HEADS heads each, share the heads of a column, and
// gridDim.x is HEAD_PARTS times the columns. A head's bits do not depend on the heads beside it.
// The new token's key and value come from qkv, never from the cache. Needs attention_common.cuh,
// cached_rows.cuh, attention_ranges.cuh; with LEAVES_OPERAND decode_gemm_convert.cuh.

#define DECODE_PARAMETERS                                                                              \
    const float* qkv, cache_t* cache_k, cache_t* cache_v, const int* block_table, int max_pages,       \
    const int* positions, int rows, const double* inv_freq, float rope_scale, float temperature,       \
    int temperature_length, int temperature_offset, const float* q_norm, const float* k_norm,          \
    float eps, float scale, float softcap, int window, const float* sinks, int slots, float* partial,  \
    float2* partial_max_sum, int* counters, float* out, u8* operand, int operand_groups SLOPES

#define THREADS (DECODE_WARPS * WARP)
// Blocks a multiprocessor holds at once: two where the registers allow it, so that one's loads hide the other's merge.
#define RESIDENT (KEY_DIM + VALUE_DIM <= 256 ? 512 / THREADS : 1)
#define HEAD_TILES ((GROUP + HEAD_TILE - 1) / HEAD_TILE)
#define MOST_HEADS (GROUP < HEAD_TILE ? GROUP : HEAD_TILE)
#define MERGE_HEADS 4  // heads whose sums the warps exchange at a time
#define MERGE_PASSES ((MOST_HEADS + MERGE_HEADS - 1) / MERGE_HEADS)
#define MERGE_STRIDE (VALUE_DIM + 2)
#define EACH_SUM (VALUE_DIM % 2 == 0 ? 2 : 1)  // elements in a sums_t
#define OWN ((MERGE_HEADS * VALUE_DIM / EACH_SUM + THREADS - 1) / THREADS)  // sums_t of a pass that one thread keeps

struct Shared {
    float raw[MOST_HEADS + 1][KEY_DIM];  // queries and key of the row that comes next, as they are in qkv
    float raw_value[VALUE_DIM];
    float query[MOST_HEADS][KEY_DIM];  // normed, rotated, not scaled
    float norms[2][KEY_DIM];           // weights of the queries' norm and of the keys'
    float new_key[KEY_DIM];            // as the cache rounds it
    float new_value[VALUE_DIM];
    float2 angles[ROPE_PAIRS + 1];
    float new_score[HEAD_TILE];
    float top[DECODE_WARPS][HEAD_TILE];  // score each warp's weights are relative to (base 2), and their sum
    float sum[DECODE_WARPS][HEAD_TILE];
    float factor[DECODE_WARPS][HEAD_TILE];  // of each warp's sums in those of the range
    float range_top[HEAD_TILE], range_sum[HEAD_TILE], new_factor[HEAD_TILE];
    float row_top[HEAD_TILE], row_sum[HEAD_TILE];  // of the row's ranges so far, where this block has them all
    float2 factors[HEAD_TILE];                     // of the row's sums so far, and of this range's
    float row_factor[HEAD_TILE];                   // of its sums in the end
#if LEAVES_OPERAND
    __align__(16) float done[MOST_HEADS * VALUE_DIM];  // the row's sums so far, then its result, to become an operand
#endif
    int last;
    bool spoils;  // the new token's value is not finite
    mark_t mark;  // of its key
};

DEVICE int column_of_block() { return blockIdx.x / HEAD_PARTS; }
DEVICE int part_of_block() { return HEAD_PARTS > 1 ? blockIdx.x % HEAD_PARTS : 0; }
DEVICE int kv_head_of_block() { return column_of_block() / HEAD_TILES; }
// Whether the blocks of a column have its heads in parts; else the first of them has all, and the others have nothing.
DEVICE bool in_parts(const Task& task) { return HEAD_PARTS > 1 && task.n_used <= PARTED_RANGES; }
DEVICE int first_in_column(const Task& task) { return in_parts(task) ? part_of_block() * PART_HEADS : 0; }
DEVICE int head0_of_block(const Task& task) {
    return kv_head_of_block() * GROUP + column_of_block() % HEAD_TILES * HEAD_TILE + first_in_column(task);
}
DEVICE int heads_of_block(const Task& task) {
    const int all = min(HEAD_TILE, GROUP - column_of_block() % HEAD_TILES * HEAD_TILE);
    return in_parts(task) ? min(PART_HEADS, all - first_in_column(task)) : part_of_block() == 0 ? all : 0;
}

// Past L1, which may hold an older launch's partial.
DEVICE float2 load_cg(const float2* p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

DEVICE float load_cg(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

// Adds n and gives the old value; a block that reads the new one sees what this block wrote before its last barrier.
DEVICE int count_up(int* counter, int n) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
    return old;
}

// ---- the new token ------------------------------------------------------------------------------------------
// Begins to fetch the next row's token into sh.raw; sixteen bytes at a time where rows are aligned.
DEVICE void fetch_token(Shared& sh, const float* qkv, const Task& task) {
    constexpr int STEP = KEY_DIM % 4 == 0 && VALUE_DIM % 4 == 0 ? 4 : 1;
    const int queries = heads_of_block(task) * KEY_DIM, kv_head = kv_head_of_block();
    const float* from = qkv + (i64)task.row * ROW_WIDTH;
    for (int i = threadIdx.x * STEP; i < queries + KEY_DIM + VALUE_DIM; i += THREADS * STEP) {
        const int d = i - queries;
        if (d < 0)
            copy_async<STEP * 4>(sh.raw[0] + i, from + head0_of_block(task) * KEY_DIM + i, true);
        else if (d < KEY_DIM)
            copy_async<STEP * 4>(sh.raw[MOST_HEADS] + d, from + KEYS_AT + kv_head * KEY_DIM + d, true);
        else
            copy_async<STEP * 4>(sh.raw_value + d - KEY_DIM, from + VALUES_AT + kv_head * VALUE_DIM + d - KEY_DIM,
                                 true);
    }
}

// Page of the new token; only the blocks of the first head tile append it.
DEVICE int page_of_token(const Task& task, const int* block_table, int max_pages) {
    return column_of_block() % HEAD_TILES == 0 && part_of_block() == 0 ? block_table[(i64)task.row * max_pages + task.position / PAGE] : -1;
}

// Stores an element of the new token's value where it has a page; clears `finite` where it is not, page or not: the
// token's score of itself depends on it in every block.
template <int DIM>
DEVICE void append_value(const CachedRow<DIM>& row, int d, Rounded v, int page, bool& finite) {
    if (page >= 0)
        store_value(row, d, v, finite);
    else
        finite = finite && is_finite(v);
}

// Brings the weights of the norms, where there are any; before the wait, and a barrier afterwards.
DEVICE void bring_norms(Shared& sh, const float* q_norm, const float* k_norm) {
    for (int i = threadIdx.x; i < KEY_DIM; i += THREADS) {
        if (q_norm) sh.norms[0][i] = q_norm[i];
        if (k_norm) sh.norms[1][i] = k_norm[i];
    }
}

// Fills query and, in the block that owns the new token, new_key and new_value, which it also appends to the cache, where
// values are finite (attention_common.cuh), but for the mark of the key; mark_spoilt() finishes that.
// The token comes from qkv or, with qkv null, from sh.raw. One warp per head, key or value; barrier afterwards. What a
// warp has to do is asked for at once: its second head would wait for memory as long as its first. meanwhile(): while it
// waits.
template <class Meanwhile>
DEVICE void take_token(Shared& sh, const Task& task, bool owns_new, int page, const float* qkv, cache_t* cache_k,
                       cache_t* cache_v, const float* q_norm, const float* k_norm, float eps, Meanwhile meanwhile) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, kv_head = kv_head_of_block(),
              n_heads = heads_of_block(task);
    const float* row = qkv + (i64)task.row * ROW_WIDTH;
    const CachedRow<KEY_DIM> key_row(cache_k, page, kv_head, task.position);
    const CachedRow<VALUE_DIM> value_row(cache_v, page, kv_head, task.position);
    const int jobs = n_heads + (owns_new ? 2 : 0);
    auto source = [&](int job) {
        return job < n_heads ? row + (head0_of_block(task) + job) * KEY_DIM
               : job == n_heads ? row + KEYS_AT + kv_head * KEY_DIM : row + VALUES_AT + kv_head * VALUE_DIM;
    };
    auto target = [&](int job) { return job < n_heads ? sh.query[job] : job == n_heads ? sh.new_key : sh.new_value; };
    constexpr int ROUNDS = (MOST_HEADS + 1 + DECODE_WARPS) / DECODE_WARPS;
    constexpr int EACH = ((KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM) + WARP - 1) / WARP;
    constexpr bool AT_ONCE_FITS = ROUNDS * EACH <= 16;
    const bool copied = AT_ONCE_FITS && qkv;
    if (copied) {
        float v[AT_ONCE_FITS ? ROUNDS : 1][EACH];
#pragma unroll
        for (int i = 0; i < (AT_ONCE_FITS ? ROUNDS : 1); ++i) {
            const int job = warp + i * DECODE_WARPS, dim = job <= n_heads ? KEY_DIM : VALUE_DIM;
            const float* const from = source(min(job, n_heads + 1)) + lane;
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                v[i][k] = job < jobs && lane + k * WARP < dim ? from[k * WARP] : 0.0f;
        }
        meanwhile();
#pragma unroll
        for (int i = 0; i < (AT_ONCE_FITS ? ROUNDS : 1); ++i) {
            const int job = warp + i * DECODE_WARPS, dim = job <= n_heads ? KEY_DIM : VALUE_DIM;
            float* const to = target(min(job, n_heads + 1)) + lane;
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                if (job < jobs && lane + k * WARP < dim) to[k * WARP] = v[i][k];
        }
    } else {
        meanwhile();
    }
    for (int job = warp; job < jobs; job += DECODE_WARPS) {
        if (job <= n_heads) {
            const bool is_key = job == n_heads;
            float* to = target(job);
            const float* from = copied ? to : qkv ? source(job) : sh.raw[is_key ? MOST_HEADS : job];
            const float* const weight = is_key ? k_norm : q_norm;
            norm_and_rotate(from, 0, to, weight ? sh.norms[is_key] : 0, eps, sh.angles);
            bool finite = true;
            ROUNDING_LOOP
            for (int d = lane; is_key && d < KEY_DIM; d += WARP) {
                const Rounded v = rounded(to[d]);
                to[d] = number_of(v);
                if (!WRITES_VALUES && d < VALUE_DIM)
                    append_value(key_row, d, v, page, finite);
                else if (page >= 0)
                    key_row.store_all_but_mark(d, v);
                if (d == SPOILT_KEY_AT) sh.mark = mark_of(v);
            }
            if (!WRITES_VALUES && is_key) {
                const bool spoils = __any_sync(FULL_MASK, !finite);
                if (lane == 0) sh.spoils = spoils;
            }
        } else {
            const float* value = copied ? sh.new_value : qkv ? source(job) : sh.raw_value;
            bool finite = true;
            ROUNDING_LOOP
            for (int d = lane; d < VALUE_DIM; d += WARP) {
                const Rounded v = rounded(value[d]);
                sh.new_value[d] = number_of(v);
                if (WRITES_VALUES) append_value(value_row, d, v, page, finite);
            }
            if (WRITES_VALUES) {
                const bool spoils = __any_sync(FULL_MASK, !finite);
                if (lane == 0) sh.spoils = spoils;
            }
        }
    }
}

// After take_token() and a barrier, in the block that owns the new token: what of its key says whether its value is
// finite. It is written once: the position may be in the cache already, and be read by rows behind it.
DEVICE void mark_spoilt(const Shared& sh, const Task& task, int page, cache_t* cache_k) {
    if (threadIdx.x == 0 && page >= 0)
        CachedRow<KEY_DIM>(cache_k, page, kv_head_of_block(), task.position).store_mark(sh.spoils ? spoilt() : sh.mark);
}

// The new token's scores in base 2, one warp per head; read after the next barrier. NaN where the token's value is not
// finite, as the scores that later rows find from its marked key.
DEVICE void score_new_token(Shared& sh, const Task& task, float scale, float softcap) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int h = warp; h < heads_of_block(task); h += DECODE_WARPS) {
        float dot = 0.0f;
        for (int d = lane; d < KEY_DIM; d += WARP) dot = fmaf(sh.query[h][d], sh.new_key[d], dot);
        dot = warp_sum(dot) * score_factor(scale, softcap);
        if (lane == 0) sh.new_score[h] = sh.spoils ? not_a_number() : score_base2(dot, softcap);
    }
}

// ---- sums ---------------------------------------------------------------------------------------------------
// Every warp has put its top and sum per head into sh, then a barrier. Gives the factor of this warp's sums of head
// lane / 4 in the range's sum; every warp computes all of it, which saves a barrier.
DEVICE float weigh_warps(Shared& sh, const Task& task, const float* sinks, float my_top) {
    const int lane = threadIdx.x & 31, h = lane >> 2, t = lane & 3, n_heads = heads_of_block(task);
    const bool newest = task.split == task.n_used - 1;
    if (h >= n_heads) return 0.0f;
    const u32 active = n_heads == 8 ? FULL_MASK : (1u << 4 * n_heads) - 1;
    float top = newest ? sh.new_score[h] : LOWEST, sum = 0.0f;
    for (int w = t; w < DECODE_WARPS; w += 4) top = fmaxf(top, sh.top[w][h]);
    top = fmaxf(top, __shfl_xor_sync(active, top, 1));
    top = fmaxf(top, __shfl_xor_sync(active, top, 2));
    for (int w = t; w < DECODE_WARPS; w += 4) sum = fmaf(sh.sum[w][h], power2(sh.top[w][h] - top), sum);
    sum += __shfl_xor_sync(active, sum, 1);
    sum += __shfl_xor_sync(active, sum, 2);
    if (threadIdx.x < WARP && t == 0) {  // read after the barrier in finish_range()
        sh.new_factor[h] = newest ? power2(sh.new_score[h] - top) : 0.0f;
        sh.range_top[h] = top;
        sh.range_sum[h] = sum = sum + sh.new_factor[h];
        const float before = task.split == 0 ? LOWEST : sh.row_top[h], risen = fmaxf(before, top);
        const float2 f = make_float2(power2(before - risen), power2(top - risen));
        const float total = fmaf(task.split == 0 ? 0.0f : sh.row_sum[h], f.x, __fmul_rn(sum, f.y));
        sh.factors[h] = f;
        sh.row_top[h] = risen;
        sh.row_sum[h] = total;
        if (newest) sh.row_factor[h] = final_factor(risen, total, sinks, head0_of_block(task) + h);
    }
    return power2(my_top - top);
}

#if VALUE_DIM % 2 == 0
typedef float2 sums_t;
DEVICE sums_t add_range(float2 sum, float2 factors, float2 v) {
    return make_float2(fmaf(sum.x, factors.x, __fmul_rn(v.x, factors.y)),
                       fmaf(sum.y, factors.x, __fmul_rn(v.y, factors.y)));
}
DEVICE float2 times(float2 v, float f) { return make_float2(v.x * f, v.y * f); }
DEVICE float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
DEVICE float2 part_of(const float* v, float f) { return make_float2(__fmul_rn(v[0], f), __fmul_rn(v[1], f)); }
#else
typedef float sums_t;
DEVICE float times(float v, float f) { return v * f; }
DEVICE float plus(float a, float b) { return a + b; }
DEVICE float part_of(const float* v, float f) { return __fmul_rn(*v, f); }
#endif
DEVICE float add_range(float sum, float2 factors, float v) {
    return fmaf(sum, factors.x, __fmul_rn(v, factors.y));
}

#if LEAVES_OPERAND
// sh.done as operands, a warp for each of 256 columns.
DEVICE void leave_operand(const Shared& sh, const Task& task, u8* operand, int groups) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    constexpr int OPERANDS = MOST_HEADS * VALUE_DIM / 256;
    __syncthreads();
    for (int i = warp; i < OPERANDS; i += DECODE_WARPS) {
        const float4* const from = (const float4*)(sh.done + i * 256) + lane;
        const float4 v[2] = {from[0], from[WARP]};
        convert(v, v, false, task.row, groups, lane,
                operand + (i64)(head0_of_block(task) * VALUE_DIM / 256 + i) * operand_bytes(groups));
    }
}
#endif

struct Merge {  // where the warps exchange sums: of `heads` heads at a time, MERGE_STRIDE apart, a warp's behind `pitch` floats
    float* sums;
    int heads, pitch;
};

// store(head0, merge) puts this warp's value sums of heads head0 .. head0 + merge.heads - 1, times the warp's factor, into
// merge, which has room for MERGE_HEADS or for all heads. A row that is whole here goes on in `sums`, or
// in sh.done where that exists, and is written when its last range is in; a range of another row leaves its partial.
template <class Store>
DEVICE void finish_range(Shared& sh, const Task& task, bool whole, sums_t (&sums)[MERGE_PASSES][OWN], Merge merge,
                         int slots, float* partial, float2* partial_max_sum, float* out, u8* operand, int groups,
                         Store store) {
    const bool newest = task.split == task.n_used - 1;
    const int n_heads = heads_of_block(task);
    float* row = out + ((i64)task.row * HEADS + head0_of_block(task)) * VALUE_DIM;
    const i64 slot = ((i64)column_of_block() * slots + task.slot0 + task.split) * MOST_HEADS + first_in_column(task);
#pragma unroll
    for (int pass = 0; pass < MERGE_PASSES; ++pass) {
        const int head0 = pass * MERGE_HEADS, n = min(MERGE_HEADS, n_heads - head0) * VALUE_DIM;
        if (HEAD_PARTS > 1 && n <= 0) break;
        if (pass == 0 || merge.heads == MERGE_HEADS) {
            if (pass > 0) __syncthreads();  // all have read the heads before
            store(head0, merge);
            __syncthreads();
        }
        const int stored0 = merge.heads == MERGE_HEADS ? head0 : 0;
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int i = (threadIdx.x + k * THREADS) * EACH_SUM, h = head0 + i / VALUE_DIM, d = i % VALUE_DIM;
            if (i >= n) break;
            sums_t sum = {};
            if (newest) sum = part_of(sh.new_value + d, sh.new_factor[h]);
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; ++w)
                sum = plus(sum, *(const sums_t*)(merge.sums + w * merge.pitch + (h - stored0) * MERGE_STRIDE + d));
            if (whole) {
#if LEAVES_OPERAND
                sums_t& so_far = *(sums_t*)(sh.done + h * VALUE_DIM + d);
#else
                sums_t& so_far = sums[pass][k];
#endif
                so_far = add_range(task.split == 0 ? sums_t{} : so_far, sh.factors[h], sum);
                if (newest) *(sums_t*)(row + h * VALUE_DIM + d) = so_far = times(so_far, sh.row_factor[h]);
            } else {
                *(sums_t*)(partial + (slot + h) * VALUE_DIM + d) = sum;
            }
        }
    }
    if (!whole && threadIdx.x < n_heads)
        partial_max_sum[slot + threadIdx.x] = make_float2(sh.range_top[threadIdx.x], sh.range_sum[threadIdx.x]);
#if LEAVES_OPERAND
    if (whole && newest && operand) leave_operand(sh, task, operand, groups);
#endif
}

#define AT_ONCE 16
DEVICE void load_partials(sums_t (&v)[AT_ONCE], const float* partial, i64 slot0, int first, int n_used, int i) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
        if (first + k < n_used)
            v[k] = load_cg((const sums_t*)(partial + (slot0 + (first + k) * MOST_HEADS) * VALUE_DIM + i));
}

// Adds up the ranges of a row in their order, as finish_range does. The first partials travel while the factors are
// computed, which are in shared memory as [MAX_SPLITS][MOST_HEADS].
DEVICE void merge_ranges(Shared& sh, const Task& task, float2* factors, const float* partial,
                         const float2* partial_max_sum, const float* sinks, int slots, float* row) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, each = sizeof(sums_t) / 4;
    const int n_heads = heads_of_block(task);
    const int n = n_heads * VALUE_DIM;
    const i64 slot0 = ((i64)column_of_block() * slots + task.slot0) * MOST_HEADS + first_in_column(task);
    sums_t v[AT_ONCE] = {};
    if ((int)threadIdx.x * each < n) load_partials(v, partial, slot0, 0, task.n_used, threadIdx.x * each);

    for (int h = warp; h < n_heads; h += DECODE_WARPS) {
        float top = LOWEST, sum = 0.0f;  // of the ranges before this round of 32
        for (int s0 = 0; s0 < task.n_used; s0 += WARP) {
            const int s = s0 + lane;
            const float2 mine =
                s < task.n_used ? load_cg(partial_max_sum + slot0 + s * MOST_HEADS + h) : make_float2(LOWEST, 0.0f);
            float risen = fmaxf(mine.x, top);
#pragma unroll
            for (int offset = 1; offset < WARP; offset <<= 1) {
                const float before = __shfl_up_sync(FULL_MASK, risen, offset);
                if (lane >= offset) risen = fmaxf(risen, before);
            }
            float before = __shfl_up_sync(FULL_MASK, risen, 1);
            if (lane == 0) before = top;
            const float2 f = make_float2(power2(before - risen), power2(mine.x - risen));
            if (s < task.n_used) factors[s * MOST_HEADS + h] = f;
            const float added = __fmul_rn(mine.y, f.y);
            for (int k0 = 0; k0 < min(WARP, task.n_used - s0); k0 += 8)  // past the end: times 1 plus 0
#pragma unroll
                for (int k = k0; k < k0 + 8; ++k)
                    sum = fmaf(sum, __shfl_sync(FULL_MASK, f.x, k), __shfl_sync(FULL_MASK, added, k));
            top = __shfl_sync(FULL_MASK, risen, WARP - 1);
        }
        if (lane == 0) sh.range_sum[h] = final_factor(top, sum, sinks, head0_of_block(task) + h);
    }
    __syncthreads();
    for (int i = threadIdx.x * each; i < n; i += THREADS * each) {
        const int h = i / VALUE_DIM;
        sums_t sum = {};
        for (int first = 0; first < task.n_used; first += AT_ONCE) {
            if (first > 0 || i != (int)threadIdx.x * each) load_partials(v, partial, slot0, first, task.n_used, i);
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k < task.n_used) sum = add_range(sum, factors[(first + k) * MOST_HEADS + h], v[k]);
        }
        *(sums_t*)(row + i) = times(sum, sh.range_sum[h]);
#if LEAVES_OPERAND
        *(sums_t*)(sh.done + i) = times(sum, sh.range_sum[h]);
#endif
    }
}

// After this block's last range of a row that others share: the block that completes the row adds it up.
DEVICE void finish_row(Shared& sh, const Task& task, int n_ranges, float* merge, const float* sinks, int slots,
                       const float* partial, const float2* partial_max_sum, int* counters, float* out, u8* operand,
                       int groups) {
    int* counter = counters + (i64)task.row * gridDim.x + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) sh.last = count_up(counter, n_ranges) == task.n_used - n_ranges;
    __syncthreads();
    if (!sh.last) return;
    if (threadIdx.x == 0) *counter = 0;
    merge_ranges(sh, task, (float2*)merge, partial, partial_max_sum, sinks, slots,
                 out + ((i64)task.row * HEADS + head0_of_block(task)) * VALUE_DIM);
#if LEAVES_OPERAND
    if (operand) leave_operand(sh, task, operand, groups);
#endif
}
