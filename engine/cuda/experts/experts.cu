// Many rows grouped by the experts they chose, for the products of gemm.cu, and the sum of what these gave.
// A pair is a row and one of its experts, pair = row * used + u. Pairs of an expert are side by side, in their order,
// and each expert begins at a multiple of `tile` places, so that a tile of tokens has one expert.

// grid: one block per expert. table: [0] the number of tiles, behind it the expert of each. places: of each pair, or -1.
extern "C" __global__ void __launch_bounds__(256)
    group_rows(const int* ids, int pairs, int tile, int* table, int* places) {
    __shared__ int counts[1024], sums[8];
    const int experts = gridDim.x, expert = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int i = threadIdx.x; i < experts; i += 256) counts[i] = 0;
    __syncthreads();
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < pairs; i += 256) {
        const int id = ids[i];
        if (id >= 0 && id < experts) atomicAdd(counts + id, 1);
        else if (expert == 0) places[i] = -1;
    }
    __syncthreads();
    int before = 0;  // tiles of the experts before this one
    for (int i = threadIdx.x; i < expert; i += 256) before += (counts[i] + tile - 1) / tile;
    before = __reduce_add_sync(FULL_MASK, before);
    if (lane == 0) sums[warp] = before;
    __syncthreads();
    before = 0;
    for (int i = 0; i < 8; ++i) before += sums[i];
    const int mine = (counts[expert] + tile - 1) / tile;
    for (int i = threadIdx.x; i < mine; i += 256) table[1 + before + i] = expert;
    if (expert == experts - 1 && threadIdx.x == 0) table[0] = before + mine;
    // Each warp looks through an eighth of the pairs twice: how many are this expert's, then where they go.
    const int share = (pairs + 255) / 256 * 32, from = warp * share, to = min(pairs, from + share);
    int found = 0;
#pragma unroll 4
    for (int i = from + lane; i < to; i += 32) found += ids[i] == expert;
    found = __reduce_add_sync(FULL_MASK, found);
    __syncthreads();  // sums has been read
    if (lane == 0) sums[warp] = found;
    __syncthreads();
    int place = before * tile;
    for (int i = 0; i < warp; ++i) place += sums[i];
#pragma unroll 4
    for (int first = from; first < to; first += 32) {
        const bool here = first + lane < to && ids[first + lane] == expert;
        const u32 those = __ballot_sync(FULL_MASK, here);
        if (here) places[first + lane] = place + __popc(those & ((1u << lane) - 1u));
        place += __popc(those);
    }
}

// out[row] += sum over u, in their order, of weights[row, u] * y[places[row, u]]; weights null: of 1. grid: rows; columns a
// multiple of 4.
extern "C" __global__ void __launch_bounds__(256)
    add_experts(const float* y, const int* places, const float* weights, int used, int columns, float* out, int stride) {
    pdl_launch();
    pdl_wait();
    const int* const place = places + (i64)blockIdx.x * used;
    const float* const weight = weights + (i64)blockIdx.x * used;
    float* const row = out + (i64)blockIdx.x * stride;
    for (int c = threadIdx.x * 4; c < columns; c += 1024) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int u = 0; u < used; ++u) {
            if (place[u] < 0) continue;
            const float4 v = *(const float4*)(y + (i64)place[u] * columns + c);
            const float w = weights ? weight[u] : 1.0f;
            sum.x = fmaf(w, v.x, sum.x), sum.y = fmaf(w, v.y, sum.y);
            sum.z = fmaf(w, v.z, sum.z), sum.w = fmaf(w, v.w, sum.w);
        }
        row[c] += sum.x, row[c + 1] += sum.y, row[c + 2] += sum.z, row[c + 3] += sum.w;
    }
}
