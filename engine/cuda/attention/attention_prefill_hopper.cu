// Prefill attention on Hopper, for a cache of float16 or of 8 bits, which becomes float16 in shared memory: online softmax over asynchronous matrix products.
// (Jay Shah et al., FlashAttention-3, 2024.)
//
// grid (KV_HEADS, tiles), 1 + CONSUMERS warpgroups. One block: up to TILE_ROWS positions of one sequence, and all
// query heads of one cache head (row m of the tile is position m / GROUP, head m % GROUP), so keys and values are
// fetched once for the whole group. It walks the cache in steps of TILE_COLUMNS positions. The first warpgroup copies
// keys and values; each of the others owns 64 rows and keeps their sums in registers. While the tensor cores work on
// the scores of one step and the values of the step before, the warpgroup is at its exponentials.
// Arguments as in attention_prefill_half.cu, except that with a pitch `out` becomes the operand of a product instead
// (operand.cu; heads * VALUE_DIM columns, a multiple of 128). Queries and weights enter as float16, as keys and values do.
//
// A row's result has the same bits whatever tile it falls into and however the prompt was cut: steps begin at multiples
// of TILE_COLUMNS of the position, and a step that the row does not see adds exactly nothing.
// Needs attention_common.cuh, hopper.cuh, prefill_stages.cuh and one of prefill_pages_half.cuh, prefill_pages_q8.cuh.

#define PRODUCER_REGISTERS (CONSUMERS == 2 ? 40 : 32)
#define CONSUMER_REGISTERS (CONSUMERS == 2 ? 232 : 160)

// 64 rows of queries as float16 into this warpgroup's part of shared memory; zeros behind the tile's last row.
DEVICE void store_queries(u32 to, const float* qkv, int4 tile, int row0, int kv_head) {
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < 64 * (KEY_DIM / 8); i += 128) {
        const int row = i / (KEY_DIM / 8), chunk = i % (KEY_DIM / 8), m = row0 + row;
        float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
        if (m < tile.y * GROUP) {
            const float* from =
                qkv + (i64)(tile.x + m / GROUP) * ROW_WIDTH + (kv_head * GROUP + m % GROUP) * KEY_DIM + chunk * 8;
            a = *(const float4*)from, b = *(const float4*)(from + 4);
        }
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to + chunk / 8 * 64 * BLOCK_ROW +
                                                                   swizzled(row, chunk % 8)),
                     "r"(two_halves(a.x, a.y)), "r"(two_halves(a.z, a.w)), "r"(two_halves(b.x, b.y)),
                     "r"(two_halves(b.z, b.w))
                     : "memory");
    }
}

// s = queries x keys of a step, begun.
DEVICE void begin_scores(float (&s)[TILE_COLUMNS / 2], u32 queries, u32 keys) {
#pragma unroll
    for (int k = 0; k < KEY_DIM / 16; ++k)
        product_of_shared<TILE_COLUMNS>(s, matrix_at(queries + k / 4 * 64 * BLOCK_ROW + k % 4 * 32, 16),
                              matrix_at(keys + k / 4 * COLUMN_BLOCK + k % 4 * 32, 16), k > 0);
    wgmma_commit();
}

template <int FROM>
DEVICE void add_columns(float* o, const u32* weights, u32 values) {
    constexpr int LEFT = VALUE_DIM - FROM, N = LEFT >= 128 ? 128 : LEFT >= 64 ? 64 : LEFT >= 32 ? 32 : 16;
    const u32 at = values + FROM / 64 * COLUMN_BLOCK + FROM % 64 * 2;
    product_of_registers<N, 1>(o + FROM / 2, weights, matrix_at(at, COLUMN_BLOCK), 1);
    if constexpr (LEFT > N) add_columns<FROM + N>(o, weights, values);
}

// o += weights x values of a step, begun.
DEVICE void begin_values(float (&o)[VALUE_DIM / 2], const u32 (&weights)[TILE_COLUMNS / 4], u32 values) {
#pragma unroll
    for (int k = 0; k < TILE_COLUMNS / 16; ++k) add_columns<0>(o, weights + 4 * k, values + k * 16 * BLOCK_ROW);
    wgmma_commit();
}

struct Softmax {             // of rows g and g + 8 of a warp
    float factor, softcap;   // of a score, base 2 included; with a soft cap, of what tanh takes
    float top[2], sum[2];    // largest score so far; sums over this lane's columns
    float shrink[2];         // what the sums so far are to be multiplied by
    int first[2], last[2];   // positions that the rows see
};

// tanh to about 1e-7 absolute, in two special instructions.
DEVICE float capped(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + power2(2.0f * LOG2E * x)));
    return 1.0f - 2.0f * y;
}

// Scores of the step at `start` become weights.
DEVICE void weigh(Softmax& state, float (&s)[TILE_COLUMNS / 2], int start, bool edge) {
    float factor = state.factor;
    if (state.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS / 2; ++i) s[i] = capped(s[i] * state.factor);
        factor = state.softcap * LOG2E;
    }
    if (edge) {
        const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS / 2; ++i) {
            const int at = column + i / 4 * 8 + i % 2;
            if (at > state.last[i / 2 % 2] || at < state.first[i / 2 % 2]) s[i] = minus_infinity();
        }
    }
    float high[2] = {state.top[0], state.top[1]}, base[2];
#pragma unroll
    for (int i = 0; i < TILE_COLUMNS / 2; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(FULL_MASK, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(FULL_MASK, high[r], 2));
        base[r] = high[r] * factor;
        state.shrink[r] = power2((state.top[r] - high[r]) * factor);
        state.top[r] = high[r];
        state.sum[r] *= state.shrink[r];
    }
#pragma unroll
    for (int i = 0; i < TILE_COLUMNS / 2; ++i) {
        s[i] = power2(fmaf(s[i], factor, -base[i / 2 % 2]));
        state.sum[i / 2 % 2] += s[i];
    }
}

DEVICE void pack_weights(u32 (&weights)[TILE_COLUMNS / 4], const float (&s)[TILE_COLUMNS / 2]) {
#pragma unroll
    for (int i = 0; i < TILE_COLUMNS / 4; ++i) weights[i] = two_halves(s[2 * i], s[2 * i + 1]);
}

// WIDTH columns of a row, from `first` on, as operand.cu writes them. The four lanes of a row hold two of every eight
// columns each, v[4 j] and v[4 j + 1]; of 16 columns the even ones make a unit of 16 bytes and the odd ones the next.
template <int WIDTH>
DEVICE void store_operand(u8* out, int pitch, int row, int first, const float* v, float factor, int t) {
    const u32 lanes = 15u << (threadIdx.x & 28);
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
        const u32 own = (u32)saturated_half(v[4 * j] * factor) | (u32)saturated_half(v[4 * j + 1] * factor) << 16;
        const u32 other = __shfl_xor_sync(lanes, own, 1);
        // An even lane stores the even columns of two lanes, an odd one their odd columns.
        const u32 pair = t & 1 ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
        const int column = first + 8 * j, unit = (column >> 3 & 6) + (t & 1);
        *(u32*)(out + ((i64)(column >> 6) * pitch + row) * 128 + ((unit ^ (row & 7)) * 16) + (column & 8) + (t & 2) * 2) = pair;
    }
}

// One of the warpgroups that compute. rank: which.
DEVICE void consume(int rank, u32 queries, u32 keys, u32 values, const Barriers& barriers, int4 tile, int kv_head,
                    int first, int count, int length, float scale, float softcap, int window, const float* qkv,
                    const float* sinks, float* out, int pitch) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int m0 = rank * 64 + (threadIdx.x % 128 >> 5) * 16;  // this warp's first row of the tile
    const int all_see_to = last_seen(tile.w + m0 / GROUP, window, length),
              all_see_from = first_seen(tile.w + (m0 + 15) / GROUP, window);
    queries += rank * QUERY_BYTES;
    store_queries(queries, qkv, tile, rank * 64, kv_head);
    publish_operand();
    named_barrier(1 + rank, 128);

    float o[VALUE_DIM / 2] = {}, s[TILE_COLUMNS / 2] = {};
    u32 weights[TILE_COLUMNS / 4];
    const int row[2] = {tile.w + (m0 + g) / GROUP, tile.w + (m0 + g + 8) / GROUP};  // positions of rows g and g + 8
    Softmax state = {softcap > 0.0f ? scale / softcap : scale * LOG2E, softcap, {LOWEST, LOWEST}, {0.0f, 0.0f},
                     {1.0f, 1.0f}, {first_seen(row[0], window), first_seen(row[1], window)},
                     {last_seen(row[0], window, length), last_seen(row[1], window, length)}};
    // Where a step holds columns that some row of this warp must not see.
    auto edge = [&](int start) { return start + TILE_COLUMNS - 1 > all_see_to || start < all_see_from; };

    barrier_wait(barriers.keys_full, 0);
    publish_operand();
    wgmma_fence();
    begin_scores(s, queries, keys);
    wgmma_wait<0>();
    pin(s);
    if (lane == 0) barrier_arrive(barriers.keys_free);
    weigh(state, s, first, edge(first));
    pack_weights(weights, s);
#if PING_PONG
    if (rank == CONSUMERS - 1 && count > 1) named_barrier_arrive(8, 256);
#endif
    for (int n = 1; n < count; ++n) {
        barrier_wait(of_stage(barriers.keys_full, n), phase_of(n));
        publish_operand();
#if PING_PONG  // the warpgroups take turns: one's products run while the other is at its exponentials
        named_barrier(8 + rank, 256);
#endif
        wgmma_fence();
        begin_scores(s, queries, keys + n % STAGES * KEY_BYTES);
        barrier_wait(of_stage(barriers.values_full, n - 1), phase_of(n - 1));
        publish_operand();
        wgmma_fence();
        begin_values(o, weights, values + (n - 1) % STAGES * VALUE_BYTES);
#if PING_PONG
        if (rank < CONSUMERS - 1 || n + 1 < count) named_barrier_arrive(8 + (rank + 1) % CONSUMERS, 256);
#endif
        wgmma_wait<1>();
        pin(s);
        if (lane == 0) barrier_arrive(of_stage(barriers.keys_free, n));
        const int start = first + n * TILE_COLUMNS;
        weigh(state, s, start, edge(start));
        wgmma_wait<0>();
        pin(o);
        if (lane == 0) barrier_arrive(of_stage(barriers.values_free, n - 1));
        if (__any_sync(FULL_MASK, state.shrink[0] != 1.0f || state.shrink[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < VALUE_DIM / 2; ++i) o[i] *= state.shrink[i / 2 % 2];
        }
        pack_weights(weights, s);
    }
    barrier_wait(of_stage(barriers.values_full, count - 1), phase_of(count - 1));
    publish_operand();
    wgmma_fence();
    begin_values(o, weights, values + (count - 1) % STAGES * VALUE_BYTES);
    wgmma_wait<0>();
    pin(o);

    const float unit = softcap > 0.0f ? softcap * LOG2E : state.factor;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        const int m = m0 + g + 8 * r, head = kv_head * GROUP + m % GROUP;
        if (m >= tile.y * GROUP) continue;
        const float f = final_factor(state.top[r] * unit, sum, sinks, head);
        if (pitch) {
            store_operand<VALUE_DIM>((u8*)out, pitch, tile.x + m / GROUP, head * VALUE_DIM, o + 2 * r, f, t);
            continue;
        }
        float* to = out + ((i64)(tile.x + m / GROUP) * HEADS + head) * VALUE_DIM + 2 * t;
#pragma unroll
        for (int j = 0; j < VALUE_DIM / 8; ++j)
            *(float2*)(to + 8 * j) = make_float2(o[4 * j + 2 * r] * f, o[4 * j + 2 * r + 1] * f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_prefill(PREFILL_PARAMETERS) {
    extern __shared__ u8 dynamic[];  // barriers, then 1024-byte aligned: queries, STAGES keys, STAGES values,
                                  // RAW_SLOTS copies
    const u32 base = shared_address(dynamic);
    const u32 queries = (base + 32 * STAGES + 8 * RAW_SLOTS + 1023) & ~1023u, keys = queries + CONSUMERS * QUERY_BYTES,
              values = keys + STAGES * KEY_BYTES;
    const Barriers barriers = {base, base + 8 * STAGES, base + 16 * STAGES, base + 24 * STAGES, base + 32 * STAGES,
                               values + STAGES * VALUE_BYTES};
    if (threadIdx.x < RAW_SLOTS) barrier_init(barriers.raw_full + 8 * threadIdx.x, 1);
    if (threadIdx.x < STAGES) {
        barrier_init(barriers.keys_full + 8 * threadIdx.x, 128);
        barrier_init(barriers.values_full + 8 * threadIdx.x, 128);
        barrier_init(barriers.keys_free + 8 * threadIdx.x, CONSUMER_THREADS / 32);
        barrier_init(barriers.values_free + 8 * threadIdx.x, CONSUMER_THREADS / 32);
    }
    __syncthreads();
    pdl_launch();
    pdl_wait();
    const int4 tile = tiles[blockIdx.y];  // x first row, y rows, z sequence, w position of the first row
    const int kv_head = blockIdx.x;
    const int length = LENGTH_OF(tile.z);
    const int end = last_seen(tile.w + tile.y - 1, window, length) + 1;  // one past the last position any row sees
    const int first = first_seen(tile.w, window) / TILE_COLUMNS * TILE_COLUMNS;
    const int count = (end - first + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int group = __shfl_sync(FULL_MASK, threadIdx.x / 128, 0);
    if (group == 0) {
        registers_fewer<PRODUCER_REGISTERS>();
        produce(keys, values, barriers, cache_k, cache_v, block_table + (i64)tile.z * max_pages, kv_head, first, end,
                count);
    } else {
        registers_more<CONSUMER_REGISTERS>();
        consume(group - 1, queries, keys, values, barriers, tile, kv_head, first, count, length, scale, softcap, window,
                qkv, sinks, out, pitch);
    }
}
