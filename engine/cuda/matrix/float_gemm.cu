// Products of any number of rows with float32 matrices: out = or += alpha * (norm(x) @ W.T + bias); see float_parts.cuh.
//
// A block multiplies TILES tiles of 16 outputs by TOKENS rows of x, a stage of 64 columns at a time; warps of each of the SPLIT
// parts have all of its rows and outputs among them.
//
// grid: (blocks of outputs, blocks of rows). Needs TILES, TOKENS, WARP_TILES (tiles of a warp), WARP_ROWS (eights of rows of a
// warp), STAGES, THREADS and BLOCKS (of a multiprocessor).

constexpr int COLUMNS = 64;
constexpr int OUTPUTS = TILES * 16, TILE_BYTES = F32::CHUNK_BYTES * COLUMNS / F32::COLUMNS;
constexpr int X_STRIDE = COLUMNS + 16;  // floats: neighbouring rows begin 16 banks apart
constexpr int X_AT = TILES * TILE_BYTES, NORM_AT = X_AT + TOKENS * X_STRIDE * 4, STAGE_BYTES = NORM_AT + COLUMNS * 4;
constexpr int SUM_STRIDE = OUTPUTS + 4;
constexpr int OUTPUT_WARPS = TILES / WARP_TILES, ROW_WARPS = TOKENS / 8 / WARP_ROWS;
constexpr int WEIGHT_PIECES = TILES * TILE_BYTES / 16 / THREADS, X_PIECES = TOKENS * COLUMNS / 4 / THREADS;
static_assert(THREADS == OUTPUT_WARPS * ROW_WARPS * SPLIT * 32, "a warp for each part");
static_assert(WEIGHT_PIECES * THREADS * 16 == TILES * TILE_BYTES && X_PIECES * THREADS * 4 == TOKENS * COLUMNS, "whole turns");
static_assert(STAGES * STAGE_BYTES >= (SPLIT * TOKENS * (SUM_STRIDE + 1)) * 4, "sums take the memory of stages");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    float_gemm(PRODUCT_PARAMETERS) {
    DYNAMIC_SHARED(room);
    PRODUCT_MATRICES
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
    const int part = warp % SPLIT, first_tile = warp / SPLIT % OUTPUT_WARPS * WARP_TILES;
    const int first_row = warp / SPLIT / OUTPUT_WARPS * WARP_ROWS * 8;
    const int block_tile = blockIdx.x * TILES, block_row = blockIdx.y * TOKENS, stages = (columns + COLUMNS - 1) / COLUMNS;

    const u8* weights[WEIGHT_PIECES];
#pragma unroll
    for (int n = 0; n < WEIGHT_PIECES; ++n) {
        const int piece = n * THREADS + thread;
        const Place place = place_of(block_tile + piece / (TILE_BYTES / 16), a, b, c, d);
        weights[n] = place.data;
        if (place.data) weights[n] += (i64)place.tile * chunks * F32::CHUNK_BYTES + piece % (TILE_BYTES / 16) * 16;
    }
    auto copy_weights = [&](int stage) {
        u8* const to = room + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int n = 0; n < WEIGHT_PIECES; ++n) {
            const bool valid = weights[n] != nullptr;
            copy_async<16>(to + (n * THREADS + thread) * 16, valid ? weights[n] + (i64)stage * TILE_BYTES : data0, valid);
        }
    };
    // Four columns of a row of floats; nothing behind K is read.
    auto copy_four = [&](float* to, const float* from, int column, bool valid) {
        if (by_four) {
            const bool inside = valid && column < columns;
            copy_async<16>(to, inside ? from + column : x, inside);
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool inside = valid && column + i < columns;
            copy_async<4>(to + i, inside ? from + column + i : x, inside);
        }
    };
    auto copy_x = [&](int stage) {
        u8* const to = room + stage % STAGES * STAGE_BYTES;
        const int column = stage * COLUMNS;
#pragma unroll
        for (int n = 0; n < X_PIECES; ++n) {
            const int piece = n * THREADS + thread, row = piece / (COLUMNS / 4), at = piece % (COLUMNS / 4) * 4;
            const bool valid = block_row + row < tokens;
            copy_four((float*)(to + X_AT) + row * X_STRIDE + at, x + (i64)(block_row + (valid ? row : 0)) * x_stride, column + at,
                      valid);
        }
        if (norm && thread < COLUMNS / 4) copy_four((float*)(to + NORM_AT) + thread * 4, norm, column + thread * 4, true);
    };

    for (int stage = 0; stage < STAGES - 1 && stage < stages; ++stage) copy_weights(stage);
    pdl_wait();
    pdl_launch();
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < stages) copy_x(stage);
        copy_commit();
    }
    float total[WARP_TILES][WARP_ROWS][4] = {}, sums[WARP_TILES][WARP_ROWS][4] = {};
    float squares[WARP_ROWS] = {}, square[WARP_ROWS] = {};
    for (int stage = 0; stage < stages; ++stage) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // all threads see this stage and have finished reading the one before
        if (stage + STAGES - 1 < stages) copy_weights(stage + STAGES - 1), copy_x(stage + STAGES - 1);
        copy_commit();
        const u8* const from = room + stage % STAGES * STAGE_BYTES;
        uint4 piece[WARP_TILES], rest[WARP_TILES];
#pragma unroll
        for (int m = 0; m < WARP_TILES; ++m) {
            const uint4* const at = (const uint4*)(from + (first_tile + m) * TILE_BYTES + part * GROUP_BYTES) + lane;
            piece[m] = at[0], rest[m] = at[32];
        }
        float4 v[WARP_ROWS], weight = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        if (norm) weight = *(const float4*)(from + NORM_AT + (part * 16 + 4 * t) * 4);
#pragma unroll
        for (int n = 0; n < WARP_ROWS; ++n) {
            v[n] = *(const float4*)(from + X_AT + ((first_row + n * 8 + g) * X_STRIDE + part * 16 + 4 * t) * 4);
            if (norm) weigh(v[n], weight, square[n]);
        }
        add_half<WARP_TILES>(sums, piece, rest, v, 0);
        add_half<WARP_TILES>(sums, piece, rest, v, 1);
        if (stage % 2 == 1 || stage == stages - 1)  // the end of a chunk
#pragma unroll
            for (int n = 0; n < WARP_ROWS; ++n) {
                squares[n] = __fadd_rn(squares[n], square[n]), square[n] = 0.0f;
#pragma unroll
                for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[m][n][i] = __fadd_rn(total[m][n][i], sums[m][n][i]), sums[m][n][i] = 0.0f;
            }
    }
    copy_wait<0>();
    __syncthreads();  // the stages' memory is free
    float(*const parts)[TOKENS][SUM_STRIDE] = (float(*)[TOKENS][SUM_STRIDE])room;
    float(*const of_squares)[TOKENS] = (float(*)[TOKENS])(room + SPLIT * TOKENS * SUM_STRIDE * 4);
#pragma unroll
    for (int n = 0; n < WARP_ROWS; ++n) {
        const int row = first_row + n * 8;
#pragma unroll
        for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) parts[part][row + 2 * t + i % 2][(first_tile + m) * 16 + g + i / 2 * 8] = total[m][n][i];
        if (norm && first_tile == 0) {
            float all = __fadd_rn(squares[n], __shfl_xor_sync(FULL_MASK, squares[n], 1));
            all = __fadd_rn(all, __shfl_xor_sync(FULL_MASK, all, 2));
            if (t == 0) of_squares[part][row + g] = all;
        }
    }
    __syncthreads();
    for (int i = thread; i < TOKENS * OUTPUTS; i += THREADS) {
        const int row = i / OUTPUTS, at = i % OUTPUTS, token = block_row + row;
        if (token >= tokens) continue;
        float value = parts[0][row][at], all = norm ? of_squares[0][row] : 0.0f;
#pragma unroll
        for (int n = 1; n < SPLIT; ++n) {
            value = __fadd_rn(value, parts[n][row][at]);
            if (norm) all = __fadd_rn(all, of_squares[n][row]);
        }
        finish(place_of(block_tile + at / 16, a, b, c, d), at % 16, token, value, norm, norm ? norm_factor(all, columns, eps) : 1.0f);
    }
}
