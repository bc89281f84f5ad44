// The same for few rows, or few outputs: a block has one tile of 16 outputs and ROWS rows, and all its warps wait for memory once.
//
// The sums of a part over a chunk (float_parts.cuh) are of their own, so WARPS * UNITS of them are made side by side, from registers
// that were asked for before the wait, and are then added in order by other threads.
//
// grid: (tiles, blocks of rows).

constexpr int ROWS = 16, EIGHTS = ROWS / 8, WARPS = 16, UNITS = 4, THREADS = WARPS * 32;
constexpr int CHUNKS = WARPS * UNITS / SPLIT;                 // of a round
constexpr int NUMBERS = EIGHTS * 4 + EIGHTS, EACH = NUMBERS * 32;  // a lane's sums and squares; those of a warp
constexpr int TOTALS = (SPLIT * EACH + THREADS - 1) / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    float_few(PRODUCT_PARAMETERS) {
    DYNAMIC_SHARED(room);
    PRODUCT_MATRICES
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
    const int part = warp % SPLIT, first_row = blockIdx.y * ROWS;
    const Place place = place_of(blockIdx.x, a, b, c, d);
    const u8* const tile = place.data + (i64)place.tile * chunks * F32::CHUNK_BYTES + part * GROUP_BYTES + lane * 16;
    float(*const made)[NUMBERS][32] = (float(*)[NUMBERS][32])room;  // of chunk * SPLIT + part
    uint4 piece[UNITS][2], rest[UNITS][2];
    // The chunk of a warp's unit; units of a part are apart, so that a round's chunks are consecutive.
    auto chunk_of = [&](int round, int unit) { return round + unit * (WARPS / SPLIT) + warp / SPLIT; };
    auto load_weights = [&](int round) {
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int chunk = chunk_of(round, unit);
                const u8* const at = tile + (i64)chunk * F32::CHUNK_BYTES + i * 4 * GROUP_BYTES;
                if (chunk < chunks) piece[unit][i] = load_stream(at), rest[unit][i] = load_stream(at + GROUP_BYTES / 2);
            }
    };
    // Four columns of a row of floats, zeros behind K.
    auto four = [&](const float* from, int column, bool valid) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!valid || column >= columns) return v;
        if (by_four) return *(const float4*)(from + column);
        v.x = from[column];
        if (column + 1 < columns) v.y = from[column + 1];
        if (column + 2 < columns) v.z = from[column + 2];
        if (column + 3 < columns) v.w = from[column + 3];
        return v;
    };
    float4 v[2][EIGHTS], next[2][EIGHTS];
    auto load_x = [&](int chunk) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) {
                const int token = first_row + n * 8 + g;
                const bool valid = chunk < chunks && token < tokens;
                next[i][n] = four(x + (i64)(valid ? token : 0) * x_stride, chunk * 128 + i * 64 + part * 16 + 4 * t, valid);
            }
    };
    load_weights(0);
    pdl_wait();
    pdl_launch();
    float total[TOTALS] = {};
    for (int round = 0; round < chunks; round += CHUNKS) {
        if (round) load_weights(round);
        load_x(chunk_of(round, 0));
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            const int chunk = chunk_of(round, unit);
#pragma unroll
            for (int i = 0; i < 2 * EIGHTS; ++i) v[i / EIGHTS][i % EIGHTS] = next[i / EIGHTS][i % EIGHTS];
            if (unit + 1 < UNITS) load_x(chunk_of(round, unit + 1));
            if (chunk >= chunks) continue;
            float sums[1][EIGHTS][4] = {}, square[EIGHTS] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (norm) {
                    const float4 weight = four(norm, chunk * 128 + i * 64 + part * 16 + 4 * t, true);
#pragma unroll
                    for (int n = 0; n < EIGHTS; ++n) weigh(v[i][n], weight, square[n]);
                }
                add_half<1>(sums, &piece[unit][i], &rest[unit][i], v[i], 0);
                add_half<1>(sums, &piece[unit][i], &rest[unit][i], v[i], 1);
            }
            float(*const to)[32] = made[(chunk - round) * SPLIT + part];
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) to[n * 4 + i][lane] = sums[0][n][i];
                to[EIGHTS * 4 + n][lane] = square[n];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TOTALS; ++i) {
            const int at = i * THREADS + thread;
            if (at >= SPLIT * EACH) continue;
            const float* const from = &made[at / EACH][0][0] + at % EACH;
            for (int chunk = 0; chunk < CHUNKS && round + chunk < chunks; ++chunk)
                total[i] = __fadd_rn(total[i], from[chunk * SPLIT * EACH]);
        }
        __syncthreads();  // the sums have been read
    }
    float(*const totals)[NUMBERS][32] = made;
#pragma unroll
    for (int i = 0; i < TOTALS; ++i) {
        const int at = i * THREADS + thread;
        if (at >= SPLIT * EACH) continue;
        if (at % EACH / 32 >= EIGHTS * 4) {
            total[i] = __fadd_rn(total[i], __shfl_xor_sync(FULL_MASK, total[i], 1));
            total[i] = __fadd_rn(total[i], __shfl_xor_sync(FULL_MASK, total[i], 2));
        }
        (&totals[at / EACH][0][0])[at % EACH] = total[i];
    }
    __syncthreads();
    if (thread >= ROWS * 16) return;
    const int n = warp / 4, row = n * 8 + 2 * t + warp % 2, at = g + warp % 4 / 2 * 8;  // of number `warp` of the lane
    if (first_row + row >= tokens) return;
    float value = totals[0][warp][lane], all = totals[0][EIGHTS * 4 + n][row % 8 * 4];
#pragma unroll
    for (int i = 1; i < SPLIT; ++i) {
        value = __fadd_rn(value, totals[i][warp][lane]);
        all = __fadd_rn(all, totals[i][EIGHTS * 4 + n][row % 8 * 4]);
    }
    finish(place, at, first_row + row, value, norm, norm ? norm_factor(all, columns, eps) : 1.0f);
}
