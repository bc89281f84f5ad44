// Rows of a decode step handed to the experts they have chosen, for the products of moe_rows.cu, and the sum of the results.
//
// A pair is a row and one of its experts, pair = row * used + u. The pairs of an expert, in their order, fill groups of
// GROUP places; every expert begins a group of its own. Up to `most` groups of an expert are a run. table: [0] the number of
// runs, [1] that of groups; then of each run its expert + pairs << 16 and its first group.

constexpr int GROUP = 8, WARPS = 16, MAX_PAIRS = 8192, MAX_EXPERTS = 1024;
constexpr int INPUT_BYTES = 5120, SUMS_AT = 4096;

// Byte of column k (a multiple of 4) of place `at` of a group, and of the sum of 8 columns: see moe_rows.cu.
DEVICE int operand_place(int at, int k) {
    return (k >> 8) * INPUT_BYTES + ((k >> 5) & 7) * 512 + (at * 4 + ((k >> 2) & 3)) * 16 + ((k >> 4) & 1) * 8;
}
DEVICE int sum_place(int at, int k) {
    return (k >> 8) * INPUT_BYTES + SUMS_AT + ((k >> 7) & 1) * 512 + (at * 4 + ((k >> 5) & 3)) * 16 + ((k >> 3) & 3) * 4;
}

// Puts every row, normed where wanted, to its places. grid: rows. columns: a multiple of 128.
// ids, weights: (rows, used), see route.cuh; ids of -1 are nowhere. places: of each pair, or -1. weigh: the weights
// multiply the input. x was there before the kernel in front began.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_rows_begin(const int* ids, const float* weights, int used, int experts, const float* x, int x_stride,
                   const float* norm, float eps, int columns, int weigh, int most, int* table, int* places, u8* operand) {
    __shared__ short chosen[MAX_PAIRS];
    __shared__ int counts[MAX_EXPERTS], own_places[32];
    __shared__ float scratch[32];
    const int rows = gridDim.x, row = blockIdx.x, pairs = rows * used, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int i = threadIdx.x; i < experts; i += WARPS * 32) counts[i] = 0;
    const float4* const from = (const float4*)(x + (i64)row * x_stride);
    const float4 first = threadIdx.x * 4 < columns ? __ldcg(from + threadIdx.x) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float factor = 1.0f;
    if (norm) {
        float square = 0.0f;
        for (int i = threadIdx.x; i * 4 < columns; i += WARPS * 32) {
            const float4 v = i == threadIdx.x ? first : __ldcg(from + i);
            square += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        }
        factor = 1.0f / sqrtf(block_sum(square, scratch) / columns + eps);
    }
    __syncthreads();
    pdl_wait();
    for (int i = threadIdx.x; i < pairs; i += WARPS * 32) {
        const int expert = ids[i];
        chosen[i] = (short)expert;
        if (expert >= 0) atomicAdd(counts + expert, 1);
    }
    __syncthreads();
    pdl_launch();
    auto count = [&](int end, int& runs, int& groups) {  // of the experts before `end`
        u32 both = 0;
        for (int i = lane; i < end; i += 32) {
            const int mine = (counts[i] + GROUP - 1) / GROUP;
            both += (u32)mine | (u32)((mine + most - 1) / most) << 16;
        }
        both = __reduce_add_sync(FULL_MASK, both);
        runs = both >> 16, groups = both & 0xffff;
    };
    for (int u = warp; u < used; u += WARPS) {
        const int pair = row * used + u, expert = chosen[pair];
        int runs, groups, before = 0;  // of experts before this one; pairs of this one before this
        count(expert, runs, groups);
        for (int i = lane; i < pair; i += 32) before += chosen[i] == expert;
        before = __reduce_add_sync(FULL_MASK, before);
        if (lane == 0) {
            const int group = groups + before / GROUP, run = runs + before / (GROUP * most);
            own_places[u] = expert < 0 ? -1 : group * GROUP + before % GROUP;
            places[pair] = own_places[u];
            if (expert >= 0 && before % (GROUP * most) == 0)
                *(int2*)(table + 2 + run * 2) = make_int2(expert | min(GROUP * most, counts[expert] - before) << 16, group);
        }
    }
    if (row == 0 && warp == WARPS - 1) {
        int runs, groups;
        count(experts, runs, groups);
        if (lane == 0) table[0] = runs, table[1] = groups;
    }
    __syncthreads();
    if (own_places[0] < 0) return;
    const i64 group_bytes = (columns + 255) / 256 * INPUT_BYTES;
    for (int i = threadIdx.x; i * 4 < columns; i += WARPS * 32) {
        float4 v = i == threadIdx.x ? first : __ldcg(from + i);
        if (norm) {
            const float4 w = __ldg((const float4*)norm + i);
            v.x = v.x * factor * w.x, v.y = v.y * factor * w.y, v.z = v.z * factor * w.z, v.w = v.w * factor * w.w;
        }
        for (int u = 0; u < used; ++u) {
            const float by = weigh ? weights[row * used + u] : 1.0f;
            auto half = [&](float value) { return (u32)saturated_half(value * by); };
            const int place = own_places[u];
            u8* const to = operand + place / GROUP * group_bytes;
            const uint2 halfs = make_uint2(half(v.x) | half(v.z) << 16, half(v.y) | half(v.w) << 16);
            *(uint2*)(to + operand_place(place % GROUP, i * 4)) = halfs;
            float sum = (low_half(halfs.x) + low_half(halfs.y)) + (high_half(halfs.x) + high_half(halfs.y));
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            if ((i & 1) == 0) *(float*)(to + sum_place(place % GROUP, i * 4)) = sum;
        }
    }
}

// out[row] += sum over u, in their order, of weights[row, u] * y[places[row, u]]; weights null: of 1. A warp has 256 columns of
// a row. operand (may be null): the result, times norm, as decode_gemm.cu reads it, for nt groups of 8 rows.
// grid: (1024 columns, rows), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    moe_rows_end(const float* y, const int* places, const float* weights, int used, int columns, float* out, int stride,
                 const float* norm, int nt, u8* operand) {
    pdl_launch();
    const int lane = threadIdx.x & 31, row = blockIdx.y, part = blockIdx.x * 4 + (threadIdx.x >> 5);
    float4 v[2] = {}, factor[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (norm) factor[i] = four_of(norm, part * 256 + i * 128 + lane * 4, columns, true);
    pdl_wait();
    if (part * 256 >= columns) return;
    const int* const place = places + (i64)row * used;
    const float* const weight = weights + (i64)row * used;
    const bool active = place[0] >= 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int k = part * 256 + i * 128 + lane * 4;
        if (k >= columns) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (active) {
#pragma unroll 8
            for (int u = 0; u < used; ++u) {
                const float4 of = __ldcg((const float4*)(y + (i64)place[u] * columns + k));
                const float w = weights ? weight[u] : 1.0f;
                sum.x = fmaf(w, of.x, sum.x), sum.y = fmaf(w, of.y, sum.y);
                sum.z = fmaf(w, of.z, sum.z), sum.w = fmaf(w, of.w, sum.w);
            }
        }
        float* const at = out + (i64)row * stride + k;
        v[i] = *(const float4*)at;
        v[i].x += sum.x, v[i].y += sum.y, v[i].z += sum.z, v[i].w += sum.w;
        if (active) *(float4*)at = v[i];
    }
    if (operand) convert(v, factor, norm != nullptr, row, nt, lane, operand + (i64)part * operand_bytes(nt));
}
