// Prefill attention on tensor cores, for a cache of float16 or of 8 bits, which becomes float16 on its way to shared memory: online softmax, no score matrix in memory.
// (Tri Dao et al., FlashAttention, 2022.)
//
// grid (tiles, HEADS), TILE_ROWS / 16 warps. One block: up to TILE_ROWS consecutive rows of one sequence, one head; it
// walks the cache in steps of TILE_COLUMNS positions, the next step's copies under way. A warp owns 16 rows.
// qkv float32 [T][ROW_WIDTH] with rotated queries; tiles int32 [n][4]: first row, rows, sequence, position of the first
// row; out float32 [T][HEADS*VALUE_DIM]. Queries enter as float16 hi + lo (exact to ~22 bits), weights as float16.
// Needs attention_common.cuh, cached_rows.cuh, with CACHE_Q8 bytes_as_halves.cuh.

#define WARPS (TILE_ROWS / 16)
#define THREADS (WARPS * WARP)
#define KEY_STRIDE (KEY_DIM + 8)  // 16 bytes of padding: the 8 rows of an ldmatrix are in different banks
#define VALUE_STRIDE (VALUE_DIM + 8)
#define STAGE (TILE_COLUMNS * (KEY_STRIDE + VALUE_STRIDE))
#define QUERIES_IN_SHARED (KEY_DIM > 128)  // else in registers

// Rows of a page into shared memory, as float16; zeros where !valid.
#if CACHE_Q8
template <int DIM>
DEVICE void copy_rows(u16* to, const CachedRow<DIM>& from, int n_valid) {
    for (int i = threadIdx.x; i < TILE_COLUMNS * (DIM / 8); i += THREADS) {
        const int p = i / (DIM / 8), d = i % (DIM / 8) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (p < n_valid) v = numbers_of(*(const uint2*)(from.bytes + i * 8), from.scales[i * 8 / BLOCK]);
        *(uint4*)(to + p * (DIM + 8) + d) = v;
    }
}
#else
template <int DIM>
DEVICE void copy_rows(u16* to, const CachedRow<DIM>& from, int n_valid) {
    for (int i = threadIdx.x; i < TILE_COLUMNS * (DIM / 8); i += THREADS) {
        const int p = i / (DIM / 8), d = i % (DIM / 8) * 8;
        copy_async<16>(to + p * (DIM + 8) + d, from.numbers + p * DIM + d, p < n_valid);
    }
}
#endif

// TILE_COLUMNS positions from `start` on, all of one page; zeros from position `end` on
// and where there is no page.
DEVICE void copy_tile(u16* stage, const cache_t* cache_k, const cache_t* cache_v, const int* pages, int kv_head, int start,
                      int end) {
    const int page = pages[start / PAGE], at = max(page, 0), n_valid = page < 0 ? 0 : end - start;
    copy_rows(stage, CachedRow<KEY_DIM>(cache_k, at, kv_head, start), n_valid);
    copy_rows(stage + TILE_COLUMNS * KEY_STRIDE, CachedRow<VALUE_DIM>(cache_v, at, kv_head, start), n_valid);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_prefill(PREFILL_PARAMETERS) {
    extern __shared__ __align__(16) u16 dynamic[];  // 2 stages [keys, values], then queries hi, lo where they live here
    pdl_launch();
    pdl_wait();
    const int4 tile = tiles[blockIdx.x];  // x first row, y rows, z sequence, w position of the first row
    const int head = blockIdx.y, kv_head = head / GROUP;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int* pages = block_table + (i64)tile.z * max_pages;
    const int length = LENGTH_OF(tile.z);
    const int end = last_seen(tile.w + tile.y - 1, window, length) + 1;  // one past the last position any row sees
    const int first = first_seen(tile.w, window) / TILE_COLUMNS * TILE_COLUMNS;
    copy_tile(dynamic, cache_k, cache_v, pages, kv_head, first, end);
    copy_commit();

    const float factor = score_factor(scale, softcap);
#if QUERIES_IN_SHARED
    u16* queries = dynamic + 2 * STAGE;
    for (int i = threadIdx.x; i < TILE_ROWS * (KEY_DIM / 2); i += THREADS) {
        const int r = i / (KEY_DIM / 2), d = i % (KEY_DIM / 2) * 2;
        float2 v = make_float2(0.0f, 0.0f);
        if (r < tile.y) v = *(const float2*)(qkv + (i64)(tile.x + r) * ROW_WIDTH + head * KEY_DIM + d);
        u32 hi, lo;
        split_halves(v.x * factor, v.y * factor, hi, lo);
        *(u32*)(queries + r * KEY_STRIDE + d) = hi;
        *(u32*)(queries + (TILE_ROWS + r) * KEY_STRIDE + d) = lo;
    }
#else
    u32 q_hi[KEY_DIM / 16][4], q_lo[KEY_DIM / 16][4];
#pragma unroll
    for (int k = 0; k < KEY_DIM / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = warp * 16 + g + 8 * (i & 1), d = 16 * k + 2 * t + 8 * (i >> 1);
            float2 v = make_float2(0.0f, 0.0f);
            if (r < tile.y) v = *(const float2*)(qkv + (i64)(tile.x + r) * ROW_WIDTH + head * KEY_DIM + d);
            split_halves(v.x * factor, v.y * factor, q_hi[k][i], q_lo[k][i]);
        }
#endif
    float o[VALUE_DIM / 8][4] = {};
    float top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};  // of rows g and g+8; sums over this lane's columns
    const int at = tile.w + warp * 16 + g;                   // position of row g

    for (int start = first, n = 0; start < end; start += TILE_COLUMNS, ++n) {
        const u16* keys = dynamic + (n & 1) * STAGE;
        const u16* values = keys + TILE_COLUMNS * KEY_STRIDE;
        copy_wait<0>();
        __syncthreads();  // this stage is full for all, and all are done with the other
        if (start + TILE_COLUMNS < end)
            copy_tile(dynamic + ((n + 1) & 1) * STAGE, cache_k, cache_v, pages, kv_head, start + TILE_COLUMNS, end);
        copy_commit();

        float s[TILE_COLUMNS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < KEY_DIM / 16; ++k) {
#if QUERIES_IN_SHARED
            u32 hi[4], lo[4];
            const u16* mine = queries + (warp * 16 + (lane & 15)) * KEY_STRIDE + 16 * k + (lane >> 4) * 8;
            load_matrix4(hi, shared_address(mine));
            load_matrix4(lo, shared_address(mine + TILE_ROWS * KEY_STRIDE));
#else
            const u32(&hi)[4] = q_hi[k];
            const u32(&lo)[4] = q_lo[k];
#endif
#pragma unroll
            for (int c = 0; c < TILE_COLUMNS / 16; ++c) {
                u32 b[4];
                load_matrix4(b, shared_address(keys + (16 * c + (lane & 7) + (lane >> 4) * 8) * KEY_STRIDE + 16 * k +
                                               (lane >> 3 & 1) * 8));
                mma16(s[2 * c], hi[0], hi[1], hi[2], hi[3], b[0], b[1]);
                mma16(s[2 * c + 1], hi[0], hi[1], hi[2], hi[3], b[2], b[3]);
                mma16(s[2 * c], lo[0], lo[1], lo[2], lo[3], b[0], b[1]);
                mma16(s[2 * c + 1], lo[0], lo[1], lo[2], lo[3], b[2], b[3]);
            }
        }
        const int row0 = tile.w + warp * 16;  // of this warp
        const bool edge =
            start + TILE_COLUMNS - 1 > last_seen(row0, window, length) || start < first_seen(row0 + 15, window);
        float high[2] = {LOWEST, LOWEST};
#pragma unroll
        for (int c = 0; c < TILE_COLUMNS / 8; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[c][i] = score_base2(s[c][i], softcap);
                const int column = start + 8 * c + 2 * t + (i & 1), row = at + 8 * (i >> 1);
                if (edge && (column > last_seen(row, window, length) || column < first_seen(row, window)))
                    s[c][i] = minus_infinity();
                high[i >> 1] = fmaxf(high[i >> 1], s[c][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            high[r] = fmaxf(high[r], __shfl_xor_sync(FULL_MASK, high[r], 1));
            high[r] = fmaxf(high[r], __shfl_xor_sync(FULL_MASK, high[r], 2));
            const float risen = fmaxf(top[r], high[r]), shrink = power2(top[r] - risen);
            top[r] = risen;
            sum[r] *= shrink;
#pragma unroll
            for (int d = 0; d < VALUE_DIM / 8; ++d) o[d][2 * r] *= shrink, o[d][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int c = 0; c < TILE_COLUMNS / 8; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[c][i] = power2(s[c][i] - top[i >> 1]);
                sum[i >> 1] += s[c][i];
            }
#pragma unroll
        for (int c = 0; c < TILE_COLUMNS / 16; ++c) {
            const u32 a0 = pack_halves(s[2 * c][0], s[2 * c][1]), a1 = pack_halves(s[2 * c][2], s[2 * c][3]);
            const u32 a2 = pack_halves(s[2 * c + 1][0], s[2 * c + 1][1]),
                      a3 = pack_halves(s[2 * c + 1][2], s[2 * c + 1][3]);
#pragma unroll
            for (int d = 0; d < VALUE_DIM / 16; ++d) {
                u32 b[4];
                load_matrix4_transposed(
                    b, shared_address(values + (16 * c + (lane & 15)) * VALUE_STRIDE + 16 * d + (lane >> 4) * 8));
                mma16(o[2 * d], a0, a1, a2, a3, b[0], b[1]);
                mma16(o[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(FULL_MASK, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL_MASK, sum[r], 2);
        const int row = warp * 16 + g + 8 * r;
        if (row >= tile.y) continue;
        const float f = final_factor(top[r], sum[r], sinks, head);
        float* to = out + ((i64)(tile.x + row) * HEADS + head) * VALUE_DIM + 2 * t;
#pragma unroll
        for (int d = 0; d < VALUE_DIM / 8; ++d)
            *(float2*)(to + 8 * d) = make_float2(o[d][2 * r] * f, o[d][2 * r + 1] * f);
    }
}
