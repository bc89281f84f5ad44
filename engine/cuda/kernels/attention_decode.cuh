// Decode attention: one new token per sequence. QK-norm, RoPE, cache append, softmax over the paged cache.
//
// grid (KV_HEADS * head tiles, Y, B), DECODE_WARPS warps. One block serves up to HEAD_TILE query heads of one cache
// head over ranges Y apart of the cached positions. The ranges depend on the length alone, never on the batch or on Y,
// and the last block of a (sequence, head tile) to finish adds them up in their order: the same bits on every run and
// whoever else is in the batch.
// qkv float32 [B][ROW_WIDTH]; block_table int32 [B][max_pages], -1 = no page: not read, and the new token is not
// appended; positions int32 [B], -1 (or behind the table) = padded row, nothing written;
// partial float32 [B][tiles][n_splits][MOST_HEADS][VALUE_DIM]; partial_max_sum float2 [B][tiles][n_splits][MOST_HEADS];
// counters int32 [B][tiles], zero before and after; out float32 [B][HEADS*VALUE_DIM].
// The new token's key and value come from qkv, never from the cache. Needs attention_common.cuh.

#define THREADS (DECODE_WARPS * WARP)
// Blocks a multiprocessor holds at once: two where the registers allow it, so that one's loads hide the other's merge.
#define RESIDENT (KEY_DIM + VALUE_DIM <= 256 ? 512 / THREADS : 1)
#define HEAD_TILES ((GROUP + HEAD_TILE - 1) / HEAD_TILE)
#define MOST_HEADS (GROUP < HEAD_TILE ? GROUP : HEAD_TILE)
#define MERGE_HEADS (MOST_HEADS + MOST_HEADS % 2)
#define MERGE_STRIDE (VALUE_DIM + 2)

struct Shared {
    float query[MOST_HEADS][KEY_DIM];  // normed, rotated, not scaled
    float new_key[KEY_DIM];            // as the cache rounds it
    float new_value[VALUE_DIM];
    float2 angles[ROPE_PAIRS + 1];
    float new_score[HEAD_TILE];
    float top[DECODE_WARPS][HEAD_TILE];  // score each warp's weights are relative to (base 2), and their sum
    float sum[DECODE_WARPS][HEAD_TILE];
    float block_top[HEAD_TILE], block_sum[HEAD_TILE], new_factor[HEAD_TILE];
    float split_factor[MAX_SPLITS][HEAD_TILE];
    int last;
};

struct Task {
    int kv_head, head0, n_heads;  // query heads head0 .. head0 + n_heads - 1
    int position, first;          // the new token, and the first position it may see
    int base, chunk, n_used;      // cached positions base .. position-1 in n_used ranges of `chunk`
    int split, low, high;         // the range at hand
    bool newest, owns_new;        // this range, or some range of this block, includes the new token
    const int* pages;
    int new_page;  // page of the new token
};

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

// Adds n and gives the old value; what the block wrote before the last barrier is seen by who reads the new one.
DEVICE int count_up(int* counter, int n) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(n) : "memory");
    return old;
}

DEVICE void take_range(Task& task, int split) {
    task.split = split;
    task.low = task.base + split * task.chunk;
    task.high = min(task.low + task.chunk, task.position);
    task.newest = split == task.n_used - 1;
}

DEVICE int whole_pages(int n, int parts) { return ((n + parts - 1) / parts + PAGE - 1) & ~(PAGE - 1); }

// false: this block has nothing to do. Up to 2 * min_chunk cached positions are one range, which needs no merge; then
// come few_splits ranges until they hold 2 * min_chunk each, then n_splits of them.
DEVICE bool find_task(Task& task, const int* positions, const int* block_table, int max_pages, int window, int n_splits,
                      int few_splits, int min_chunk) {
    task.position = positions[blockIdx.z];
    if (task.position < 0 || task.position >= max_pages * PAGE) return false;
    task.kv_head = blockIdx.x / HEAD_TILES;
    const int in_group = (blockIdx.x % HEAD_TILES) * HEAD_TILE;
    task.head0 = task.kv_head * GROUP + in_group;
    task.n_heads = min(HEAD_TILE, GROUP - in_group);
    task.first = window > 0 ? max(0, task.position - window + 1) : 0;
    task.base = task.first & ~(PAGE - 1);
    const int n = task.position - task.base;
    task.chunk = max(min_chunk, min(whole_pages(n, few_splits), 2 * min_chunk));
    task.chunk = max(task.chunk, n <= 2 * min_chunk ? 2 * min_chunk : whole_pages(n, n_splits));
    task.n_used = max(1, (n + task.chunk - 1) / task.chunk);
    if (blockIdx.y >= task.n_used) return false;
    task.owns_new = (task.n_used - 1) % gridDim.y == blockIdx.y;
    task.pages = block_table + (i64)blockIdx.z * max_pages;
    task.new_page = task.owns_new ? task.pages[task.position / PAGE] : 0;
    take_range(task, blockIdx.y);
    return true;
}

// Fills query and, in the block that owns the new token, new_key and new_value, which it also appends to the cache
// (first head tile only). One warp per head, key or value; barrier afterwards.
DEVICE void take_token(Shared& sh, const Task& task, const float* qkv, cache_t* cache_k, cache_t* cache_v,
                       const float* q_norm, const float* k_norm, float eps) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const float* row = qkv + (i64)blockIdx.z * ROW_WIDTH;
    const bool append = blockIdx.x % HEAD_TILES == 0 && task.new_page >= 0;
    for (int job = warp; job < task.n_heads + (task.owns_new ? 2 : 0); job += DECODE_WARPS) {
        if (job < task.n_heads) {
            norm_and_rotate(row + (task.head0 + job) * KEY_DIM, 0, sh.query[job], q_norm, eps, sh.angles);
        } else if (job == task.n_heads) {
            const i64 at = cache_row(task.new_page, task.kv_head, task.position);
            norm_and_rotate(row + KEYS_AT + task.kv_head * KEY_DIM, 0, sh.new_key, k_norm, eps, sh.angles);
            for (int d = lane; d < KEY_DIM; d += WARP) {
                const cache_t rounded = to_cache(sh.new_key[d]);
                sh.new_key[d] = from_cache(rounded);
                if (append) cache_k[at * KEY_DIM + d] = rounded;
            }
        } else {
            const i64 at = cache_row(task.new_page, task.kv_head, task.position);
            for (int d = lane; d < VALUE_DIM; d += WARP) {
                const cache_t rounded = to_cache(row[VALUES_AT + task.kv_head * VALUE_DIM + d]);
                sh.new_value[d] = from_cache(rounded);
                if (append) cache_v[at * VALUE_DIM + d] = rounded;
            }
        }
    }
}

// The new token's scores in base 2, one warp per head; read after the next barrier.
DEVICE void score_new_token(Shared& sh, const Task& task, float scale, float softcap) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (!task.owns_new) return;
    for (int h = warp; h < task.n_heads; h += DECODE_WARPS) {
        float dot = 0.0f;
        for (int d = lane; d < KEY_DIM; d += WARP) dot += sh.query[h][d] * sh.new_key[d];
        dot = warp_sum(dot) * score_factor(scale, softcap);
        if (lane == 0) sh.new_score[h] = score_base2(dot, softcap);
    }
}

// Every warp has put its top and sum per head into sh, then a barrier. Gives the factor of this warp's sums of head
// lane / 4 in the block's sum; every warp computes all of it, which saves a barrier.
DEVICE float weigh_warps(Shared& sh, const Task& task, float my_top) {
    const int lane = threadIdx.x & 31, h = lane >> 2, t = lane & 3;
    if (h >= task.n_heads) return 0.0f;
    const u32 active = task.n_heads == 8 ? FULL_MASK : (1u << 4 * task.n_heads) - 1;
    float top = task.newest ? sh.new_score[h] : LOWEST, sum = 0.0f;
    for (int w = t; w < DECODE_WARPS; w += 4) top = fmaxf(top, sh.top[w][h]);
    top = fmaxf(top, __shfl_xor_sync(active, top, 1));
    top = fmaxf(top, __shfl_xor_sync(active, top, 2));
    for (int w = t; w < DECODE_WARPS; w += 4) sum += sh.sum[w][h] * power2(sh.top[w][h] - top);
    sum += __shfl_xor_sync(active, sum, 1);
    sum += __shfl_xor_sync(active, sum, 2);
    if (threadIdx.x < WARP && t == 0) {  // read after the barrier in finish()
        sh.new_factor[h] = task.newest ? power2(sh.new_score[h] - top) : 0.0f;
        sh.block_top[h] = top;
        sh.block_sum[h] = sum + sh.new_factor[h];
    }
    return power2(my_top - top);
}

#define AT_ONCE 16
#if VALUE_DIM % 2 == 0
typedef float2 sums_t;
DEVICE void add_weighted(float2& sum, float f, float2 v) { sum.x += f * v.x, sum.y += f * v.y; }
DEVICE float2 times(float2 v, float f) { return make_float2(v.x * f, v.y * f); }
#else
typedef float sums_t;
DEVICE void add_weighted(float& sum, float f, float v) { sum += f * v; }
DEVICE float times(float v, float f) { return v * f; }
#endif

DEVICE void load_partials(sums_t (&v)[AT_ONCE], const float* partial, i64 slot0, int first, int n_used, int i) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
        if (first + k < n_used)
            v[k] = load_cg((const sums_t*)(partial + (slot0 + (first + k) * MOST_HEADS) * VALUE_DIM + i));
}

// The last block of a cell: adds up its splits in their order. The first partials travel while the weights are
// computed.
DEVICE void merge_splits(Shared& sh, const Task& task, const float* partial, const float2* partial_max_sum,
                         const float* sinks, int n_splits, float* row) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, each = sizeof(sums_t) / 4;
    const int n = task.n_heads * VALUE_DIM;
    const i64 slot0 = ((i64)blockIdx.z * gridDim.x + blockIdx.x) * n_splits * MOST_HEADS;
    sums_t v[AT_ONCE] = {};
    if ((int)threadIdx.x * each < n) load_partials(v, partial, slot0, 0, task.n_used, threadIdx.x * each);

    for (int h = warp; h < task.n_heads; h += DECODE_WARPS) {
        float2 mine[MAX_SPLITS / WARP];
        float top = LOWEST, sum = 0.0f;
#pragma unroll
        for (int k = 0; k < MAX_SPLITS / WARP; ++k) {
            const int s = k * WARP + lane;
            mine[k] =
                s < task.n_used ? load_cg(partial_max_sum + slot0 + s * MOST_HEADS + h) : make_float2(LOWEST, 0.0f);
            top = fmaxf(top, mine[k].x);
        }
        top = warp_max(top);
#pragma unroll
        for (int k = 0; k < MAX_SPLITS / WARP; ++k) {
            const float factor = power2(mine[k].x - top);
            sh.split_factor[k * WARP + lane][h] = factor;
            sum += factor * mine[k].y;
        }
        sum = warp_sum(sum);
        if (lane == 0) sh.block_sum[h] = final_factor(top, sum, sinks, task.head0 + h);
    }
    __syncthreads();
    for (int i = threadIdx.x * each; i < n; i += THREADS * each) {
        const int h = i / VALUE_DIM;
        sums_t sum = {};
        for (int first = 0; first < task.n_used; first += AT_ONCE) {
            if (first > 0 || i != (int)threadIdx.x * each) load_partials(v, partial, slot0, first, task.n_used, i);
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k < task.n_used) add_weighted(sum, sh.split_factor[first + k][h], v[k]);
        }
        *(sums_t*)(row + i) = times(sum, sh.block_sum[h]);
    }
}

// merge [DECODE_WARPS][MERGE_HEADS][MERGE_STRIDE] holds each warp's value sums of one range, already times the warp's
// factor. Writes the output where there is only this range, else its partial.
DEVICE void finish_range(Shared& sh, const Task& task, const float* merge, const float* sinks, int n_splits,
                         float* partial, float2* partial_max_sum, float* out) {
    __syncthreads();
    float* row = out + ((i64)blockIdx.z * HEADS + task.head0) * VALUE_DIM;
    const i64 slot = (((i64)blockIdx.z * gridDim.x + blockIdx.x) * n_splits + task.split) * MOST_HEADS;
    for (int i = threadIdx.x; i < task.n_heads * VALUE_DIM; i += THREADS) {
        const int h = i / VALUE_DIM, d = i % VALUE_DIM;
        float sum = task.newest ? sh.new_factor[h] * sh.new_value[d] : 0.0f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; ++w) sum += merge[(w * MERGE_HEADS + h) * MERGE_STRIDE + d];
        if (task.n_used == 1)
            row[i] = sum * final_factor(sh.block_top[h], sh.block_sum[h], sinks, task.head0 + h);
        else
            partial[slot * VALUE_DIM + i] = sum;
    }
    if (task.n_used > 1 && threadIdx.x < task.n_heads)
        partial_max_sum[slot + threadIdx.x] = make_float2(sh.block_top[threadIdx.x], sh.block_sum[threadIdx.x]);
}

// After a block's last range: the block that completes the cell merges it.
DEVICE void finish_cell(Shared& sh, const Task& task, const float* sinks, int n_splits, const float* partial,
                        const float2* partial_max_sum, int* counters, float* out) {
    if (task.n_used == 1) return;
    const i64 cell = (i64)blockIdx.z * gridDim.x + blockIdx.x;
    const int mine = (task.n_used - 1 - blockIdx.y) / gridDim.y + 1;
    __syncthreads();
    if (threadIdx.x == 0) sh.last = count_up(&counters[cell], mine) == task.n_used - mine;
    __syncthreads();
    if (!sh.last) return;
    if (threadIdx.x == 0) counters[cell] = 0;
    merge_splits(sh, task, partial, partial_max_sum, sinks, n_splits,
                 out + ((i64)blockIdx.z * HEADS + task.head0) * VALUE_DIM);
}
