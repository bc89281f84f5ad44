// Bias, QK-norm and RoPE of T rows; queries in place, keys and values into the paged cache. For prompts, and with
// first_head = HEADS, which leaves the queries alone, for decode steps in which rows of one sequence follow each other.
//
// grid (T, Y), 128 threads: the Y blocks of a row share its heads, one warp a head; the one of a key also stores its value.
// Cached values are finite, see attention_common.cuh. qkv float32 [T][ROW_WIDTH]; bias float32 [ROW_WIDTH]
// or null; block_table int32 [sequences][max_pages], -1 = no page: keys and values are dropped; row_sequence, positions
// int32 [T], position -1 = leave the row alone; inv_freq float64 [ROPE_PAIRS]; q_norm, k_norm float32 [KEY_DIM] or null.
// Needs attention_common.cuh, cached_rows.cuh.
extern "C" __global__ void __launch_bounds__(128)
    rope_append(float* qkv, const float* bias, cache_t* cache_k, cache_t* cache_v, const int* block_table,
                int max_pages, const int* row_sequence, const int* positions, const double* inv_freq, float rope_scale,
                float temperature, int temperature_length, int temperature_offset, const float* q_norm,
                const float* k_norm, float eps, int first_head) {
    __shared__ float2 angles[ROPE_PAIRS + 1];
    __shared__ float scratch[4][KEY_DIM];
    pdl_launch();
    pdl_wait();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int position = positions[blockIdx.x];
    if (position < 0) return;
    const int slot = position / PAGE;
    const int page = slot < max_pages ? block_table[(i64)row_sequence[blockIdx.x] * max_pages + slot] : -1;
    float* row = qkv + (i64)blockIdx.x * ROW_WIDTH;
    rope_angles(angles, position, inv_freq, rope_scale);
    __syncthreads();

    for (int head = first_head + blockIdx.y * 4 + warp; head < HEADS + KV_HEADS; head += gridDim.y * 4) {
        float* from = row + head * KEY_DIM;  // keys follow the queries
        norm_and_rotate(from, bias ? bias + head * KEY_DIM : 0, scratch[warp], head < HEADS ? q_norm : k_norm, eps,
                        angles);
        if (head < HEADS) {
            const float factor = query_factor({temperature, temperature_length, temperature_offset}, position);
            for (int d = lane; d < KEY_DIM; d += WARP) from[d] = scratch[warp][d] * factor;
        } else if (page >= 0) {
            const int value = VALUES_AT + (head - HEADS) * VALUE_DIM;
            const CachedRow<KEY_DIM> key_row(cache_k, page, head - HEADS, position);
            const CachedRow<VALUE_DIM> value_row(cache_v, page, head - HEADS, position);
            bool finite = true;
            for (int d = lane; WRITES_VALUES && d < VALUE_DIM; d += WARP)
                store_value(value_row, d, rounded(row[value + d] + (bias ? bias[value + d] : 0.0f)), finite);
            for (int d = lane; d < KEY_DIM; d += WARP) {
                const Rounded v = rounded(scratch[warp][d]);
                if (!WRITES_VALUES && d < VALUE_DIM)
                    store_value(key_row, d, v, finite);
                else
                    key_row.store(d, v);
            }
            if (__any_sync(FULL_MASK, !finite) && lane == SPOILT_KEY_AT % WARP) key_row.store_mark(spoilt());
        }
        __syncwarp();
    }
}
