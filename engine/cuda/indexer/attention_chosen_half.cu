// Attention over chosen positions on the tensor cores, for a float16 cache and widths that are multiples of 16; see
// attention_chosen.cuh, which is needed.
//
// A block has 16 query heads, the rows of all products, and gathers the keys (and values) of 32 positions into shared memory.
// Scores: the warps share the columns of the keys, each with its part of the queries in registers; parts are added in the
// order of the warps. Then each warp turns the scores of two heads into weights, and last the warps share the columns of the
// values. Queries and weights are two float16 numbers each, so results are as exact as float32 sums.

#define HEADS_HERE 16
#define K_STEPS (KEY_DIM / 16)
#define K_EACH ((K_STEPS + WARPS - 1) / WARPS)
#define PAIRS (VALUE_DIM / 16)  // pairs of tiles of 8 columns
#define PAIRS_EACH ((PAIRS + WARPS - 1) / WARPS)
#define KEY_ROW (KEY_DIM + 8)  // numbers of a row in shared memory: rows begin in different banks
#ifdef VALUES_IN_KEYS
#define VALUE_ROW KEY_ROW
#define VALUES_HERE 0
#else
#define VALUE_ROW (VALUE_DIM + 8)
#define VALUES_HERE (TILE * VALUE_ROW)
#endif
#define PART_ROW (TILE + 1)
#define WEIGHT_ROW (TILE + 8)

static_assert(HEAD_TILE == HEADS_HERE && KEY_DIM % 16 == 0 && VALUE_DIM % 16 == 0 && CACHE_HALF, "other shapes go elsewhere");

struct Chosen {  // in dynamic shared memory
    __align__(16) u16 keys[TILE * KEY_ROW + VALUES_HERE];
    __align__(16) u16 weights[2][HEADS_HERE * WEIGHT_ROW];  // rounded, and what rounding lost
    float parts[WARPS][HEADS_HERE * PART_ROW];
    int at[2][TILE];  // rows of the cache, of this tile and the next
    float shrink[HEADS_HERE], top[HEADS_HERE], weight[HEADS_HERE];
};

// Begins to bring rows of `width` numbers; zeros where there is none.
template <int WIDTH, int ROW>
DEVICE void gather(u16* to, const cache_t* from, const int* at) {
    for (int i = threadIdx.x; i < TILE * (WIDTH / 8); i += THREADS) {
        const int row = i / (WIDTH / 8), d = i % (WIDTH / 8) * 8;
        copy_async<16>(to + row * ROW + d, from + (i64)max(at[row], 0) * WIDTH + d, at[row] >= 0);
    }
}

DEVICE u32 pair_at(const u16* from) { return *(const u32*)from; }

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_chosen(const float* qkv, const cache_t* cache_k, const cache_t* cache_v, const int* block_table,
                     int max_pages, const int* row_sequence, const int* positions, const int* chosen, int count,
                     float scale, float softcap, const float* sinks, int range, int dealt, int n_ranges, float* partial,
                     float2* partial_max_sum, float* out) {
    extern __shared__ __align__(16) u8 memory[];
    Chosen& sh = *(Chosen*)memory;
    u16* const values = VALUES_HERE ? sh.keys + TILE * KEY_ROW : sh.keys;
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, position = positions[row], warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (position < 0) return;
    const int column = blockIdx.y % (KV_HEADS * HEAD_TILES), kv_head = column / HEAD_TILES, g = lane >> 2, t = lane & 3;
    const int head0 = kv_head * GROUP + column % HEAD_TILES * HEAD_TILE;
    const int n_heads = min(HEAD_TILE, GROUP - column % HEAD_TILES * HEAD_TILE);
    const int* pages = block_table + (i64)row_sequence[row] * max_pages;
    const int* list = chosen + ((i64)row * CHOICES + (CHOICES == 1 ? 0 : kv_head)) * count;
    const float factor = score_factor(scale, softcap);

    u32 high_q[K_EACH][4], low_q[K_EACH][4];
#pragma unroll
    for (int k = 0; k < K_EACH; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int step = warp * K_EACH + k, h = g + i % 2 * 8, d = step * 16 + 2 * t + i / 2 * 8;
            const bool is = step < K_STEPS && h < n_heads;
            const float* q = qkv + (i64)row * ROW_WIDTH + (head0 + (is ? h : 0)) * KEY_DIM + (is ? d : 0);
            split_halves(is ? q[0] : 0.0f, is ? q[1] : 0.0f, high_q[k][i], low_q[k][i]);
        }

    Sum all[2];
    float totals[PAIRS_EACH][2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) all[i].top = LOWEST, all[i].weight = 0.0f;
    const int first = blockIdx.y / (KV_HEADS * HEAD_TILES), end = dealt ? first + 1 : n_ranges;
#pragma unroll 1
    for (int split = first; split < end; ++split) {
        const int low = split * range, high = min(low + range, PLACES(count));
        float o[PAIRS_EACH][2][4] = {};
        float top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};  // of heads 2 * warp and 2 * warp + 1
        if (warp == 0) sh.at[0][lane] = chosen_row(list, low + lane, high, position, pages, kv_head);
        __syncthreads();
        int turn = 0;
#pragma unroll 1
        for (int start = low; start < high; start += TILE, turn ^= 1) {
            gather<KEY_DIM, KEY_ROW>(sh.keys, cache_k, sh.at[turn]);
            if (VALUES_HERE) gather<VALUE_DIM, VALUE_ROW>(values, cache_v, sh.at[turn]);
            copy_commit();
            if (warp == 0)
                sh.at[turn ^ 1][lane] = chosen_row(list, start + TILE + lane, high, position, pages, kv_head);
            copy_wait<0>();
            __syncthreads();

            float s[TILE / 8][4] = {};
#pragma unroll
            for (int k = 0; k < K_EACH; ++k) {
                const int step = warp * K_EACH + k;
                if (step >= K_STEPS) continue;
#pragma unroll
                for (int n = 0; n < TILE / 8; ++n) {
                    const u16* key = sh.keys + (n * 8 + g) * KEY_ROW + step * 16 + 2 * t;
                    const u32 b0 = pair_at(key), b1 = pair_at(key + 8);
                    mma16(s[n], high_q[k][0], high_q[k][1], high_q[k][2], high_q[k][3], b0, b1);
                    mma16(s[n], low_q[k][0], low_q[k][1], low_q[k][2], low_q[k][3], b0, b1);
                }
            }
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sh.parts[warp][(g + i / 2 * 8) * PART_ROW + n * 8 + 2 * t + i % 2] = s[n][i];
            __syncthreads();

#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int h = 2 * warp + i;
                float dot = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) dot += sh.parts[w][h * PART_ROW + lane];
                const bool seen = sh.at[turn][lane] >= 0;
                const float score = seen ? score_base2(__fmul_rn(dot, factor), softcap) : minus_infinity();
                const float risen = fmaxf(top[i], warp_max(score)), shrink = power2(top[i] - risen),
                            weight = power2(score - risen);
                top[i] = risen;
                sum[i] = fmaf(sum[i], shrink, weight);
                const u16 rounded = float_to_half(weight);
                sh.weights[0][h * WEIGHT_ROW + lane] = rounded;
                sh.weights[1][h * WEIGHT_ROW + lane] = float_to_half(weight - half_to_float(rounded));
                if (lane == 0) sh.shrink[h] = shrink;
            }
            __syncthreads();

            const float shrinks[2] = {sh.shrink[g], sh.shrink[g + 8]};
#pragma unroll
            for (int j = 0; j < PAIRS_EACH; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[j][half][i] = __fmul_rn(o[j][half][i], shrinks[i / 2]);
#pragma unroll
            for (int k = 0; k < TILE / 16; ++k) {
                u32 a[2][4];
#pragma unroll
                for (int part = 0; part < 2; ++part)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        a[part][i] = pair_at(sh.weights[part] + (g + i % 2 * 8) * WEIGHT_ROW + k * 16 + 2 * t + i / 2 * 8);
#pragma unroll
                for (int j = 0; j < PAIRS_EACH; ++j) {
                    const int pair = warp * PAIRS_EACH + j;
                    if (pair >= PAIRS) continue;
                    u32 b[4];
                    load_matrix4_transposed(
                        b, shared_address(values + (k * 16 + (lane & 15)) * VALUE_ROW + pair * 16 + (lane >> 4) * 8));
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int part = 0; part < 2; ++part)
                            mma16(o[j][half], a[part][0], a[part][1], a[part][2], a[part][3], b[2 * half], b[2 * half + 1]);
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = warp_sum(sum[i]);
            if (lane == 0) sh.top[2 * warp + i] = top[i], sh.weight[2 * warp + i] = total;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int h = g + i * 8;
            Sum whole;  // of the range
            whole.top = sh.top[h], whole.weight = sh.weight[h];
            const float2 factors = join(all[i], whole);
            const i64 slot = ((i64)row * HEADS + head0 + h) * n_ranges + split;
            if (dealt && warp == 0 && t == 0 && h < n_heads)
                partial_max_sum[slot] = make_float2(whole.top, whole.weight);
#pragma unroll
            for (int j = 0; j < PAIRS_EACH; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int pair = warp * PAIRS_EACH + j, d = pair * 16 + half * 8 + 2 * t + e;
                        const float v = o[j][half][2 * i + e];
                        if (!dealt) totals[j][half][2 * i + e] = joined(totals[j][half][2 * i + e], v, factors);
                        else if (pair < PAIRS && h < n_heads) partial[slot * VALUE_DIM + d] = v;
                    }
        }
        __syncthreads();  // the tops are read
    }
    if (dealt) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int h = g + i * 8;
        if (h >= n_heads) continue;
        const float f = final_factor(all[i].top, all[i].weight, sinks, head0 + h);
        float* to = out + ((i64)row * HEADS + head0 + h) * VALUE_DIM;
#pragma unroll
        for (int j = 0; j < PAIRS_EACH; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int pair = warp * PAIRS_EACH + j, d = pair * 16 + half * 8 + 2 * t + e;
                    if (pair < PAIRS) to[d] = totals[j][half][2 * i + e] * f;
                }
    }
}
