// The experts a row chooses times that row, straight from the packed layouts of formats.cuh.
//
// The experts of a layer are one packed matrix, expert after expert; which ones a row uses is read from device memory
// after the wait, so a captured step reads only their bytes. A (row, expert) pair is computed by itself: its bits depend
// on nothing else. The multiplication is matvec_tile.cuh's, with one sequence.
//
// Defines: FORMAT0; ACTIVATION (activation.py's KernelActivation); WARPS of a block; SPLIT of them share a tile in moe_gate_up;
// DEPTH slots of SLOT bytes per warp; those of route.cuh.

#define MEMBER __device__ __forceinline__

// What one lane puts in shared memory of 128 columns: 4l .. 4l+3, which are sub-block l / 8, group l / 4 % 2.
struct Converter {
    u8* input;
    float* scales;
    float2* sums;
    MEMBER Converter(u8* at, int quads)
        : input(at), scales((float*)(at + quads * 32 * PIECE)), sums((float2*)(scales + quads * 4)) {}
    MEMBER Inputs inputs(int quads) const {
        Inputs in;
        in.pieces = shared_address(input);
        in.scales = scales;
        in.sums = sums;
        in.quads = quads;
        return in;
    }
    MEMBER void put(float4 y, int place, int lane) {
        const int s = lane >> 3, half = (lane >> 2) & 1, t = lane & 3, index = place * 4 + s;
        u8* const at = input + place * (32 * PIECE) + (s * 8 + t) * PIECE + half * (PIECE / 2);
        const float largest = largest_of_eight(fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w))));
        float undo;
        if (HALVES) {
            // 2^e with 2^e * largest in [2^14, 2^15)
            const u32 exponent = min(max(__float_as_uint(largest) >> 23, 20u), 240u);
            const float up = __uint_as_float((268u - exponent) << 23);
            undo = __uint_as_float((exponent - 14u) << 23);
            y.x *= up, y.y *= up, y.z *= up, y.w *= up;
            const u32 high0 = two_halves(y.x, y.y), high1 = two_halves(y.z, y.w);
            const u32 low0 = two_halves(y.x - low_half(high0), y.y - high_half(high0));
            const u32 low1 = two_halves(y.z - low_half(high1), y.w - high_half(high1));
            *(uint2*)at = make_uint2(high0, high1);
            *(uint2*)(at + 4 * PIECE) = make_uint2(low0, low1);
        } else {
            // Integers in the low bits of floats, plus 128: high byte, and low byte off by 128.
            const float bounded = fmaxf(largest, 1e-30f), up = __fdividef(32600.0f, bounded);
            undo = bounded * (1.0f / 32600.0f);
            const float shift = 12582912.0f + 128.0f;
            const u32 i0 = __float_as_uint(fmaf(y.x, up, shift)), i1 = __float_as_uint(fmaf(y.y, up, shift));
            const u32 i2 = __float_as_uint(fmaf(y.z, up, shift)), i3 = __float_as_uint(fmaf(y.w, up, shift));
            const u32 a01 = __byte_perm(i0, i1, 0x5140), a23 = __byte_perm(i2, i3, 0x5140);
            const u32 high = __byte_perm(a01, a23, 0x7632), low = __byte_perm(a01, a23, 0x5410) ^ 0x80808080u;
            *(u32*)at = high;
            *(u32*)(at + 4 * PIECE) = low;
            int sum = __dp4a((int)high, 0x01010101, 0) * 256 + __dp4a((int)low, 0x01010101, 0);
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            if (t == 0) ((float*)sums)[index * 2 + half] = (float)sum * undo;
        }
        if ((lane & 7) == 0) scales[index] = undo;
    }
};

// Columns 4l .. 4l+3 of a quad, zeros behind the end.
DEVICE float4 load_four(const float* row, int quad, int columns, int lane) {
    const int k = quad * 128 + lane * 4, left = columns - k;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (left >= 4 && (((u64)row | (u64)columns * 4) & 15) == 0) return __ldcg((const float4*)(row + k));
    if (left > 0) v.x = __ldcg(row + k);
    if (left > 1) v.y = __ldcg(row + k + 1);
    if (left > 2) v.z = __ldcg(row + k + 2);
    if (left > 3) v.w = __ldcg(row + k + 3);
    return v;
}

// A warp's stream of chunks through its ring.
struct Stream {
    u8* ring;
    u32 ring_at, barrier_at, parity;
    int slot;
    MEMBER void open(u8* base, u64* barriers, int warp, int lane) {
        ring = base + warp * (DEPTH * SLOT);
        ring_at = shared_address(ring);
        barrier_at = shared_address(barriers + warp * DEPTH);
        parity = 0;
        slot = 0;
        if (lane == 0)
            for (int i = 0; i < DEPTH; ++i) open_slot(barrier_at + i * 8);
        publish_slots();
        __syncwarp();
    }
    MEMBER void put(int at, const u8* source, bool any, int lane) {
        if (any) fetch(ring_at + at * SLOT, barrier_at + at * 8, source, FORMAT0::CHUNK_BYTES, lane);
        fetch_commit();
    }
    MEMBER const u8* take() {
        fetch_wait(barrier_at + slot * 8, parity);
        return ring + slot * SLOT;
    }
    MEMBER void next() {
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
};

// Routes each row (route.cuh) and multiplies: h[pair] = f(gate_e n(x) + gate_bias_e) * (up_e n(x) + up_bias_e) for the
// row's PLACES experts e, row = pair / PLACES. With weigh_input, n(x) is multiplied by the expert's weight. A row with
// positions[row] < 0 is left alone. grid: (blocks of WARPS / SPLIT tiles, pairs).
// x, norm and positions are read before the wait: whatever wrote them has to be older than the launch before this one,
// which gives the scores and waits before it lets this one start. Warp 0 waits and routes, the others convert the row.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_gate_up(const u8* data, const float* scale, int tiles, int rows, int columns, const float* scores,
                const float* bias, float weight_scale, float shared_scale, const int* positions, int weigh_input,
                const float* x, int x_stride, const float* norm, float eps, const float* gate_bias, const float* up_bias, float* h,
                float one_column) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Routed routed;
    constexpr int QUADS = FORMAT0::COLUMNS / 128, CONVERTERS = WARPS - 1;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / SPLIT, member = warp % SPLIT;
    const int chunks = (columns + FORMAT0::COLUMNS - 1) / FORMAT0::COLUMNS, quads = chunks * QUADS;
    u64* const barriers = (u64*)(shared + WARPS * DEPTH * SLOT);
    float* const partial = (float*)(barriers + (WARPS * DEPTH + 1) / 2 * 2);  // [warp][16]
    float* const squares = partial + WARPS * 16;
    Converter converter((u8*)(squares + (WARPS + 3) / 4 * 4), quads);
    const int pair = blockIdx.y, row = pair / PLACES, place = pair % PLACES;
    if (positions && positions[row] < 0) {
        pdl_wait();
        return;
    }
    Stream stream;
    stream.open(shared, barriers, warp, lane);
    bring_grids();
    if (warp == 0) {
        pdl_wait();
        // Its weights queue behind these: it has to find its experts, too, and it takes its time to start.
        pdl_launch();
        choose_experts(scores + (i64)row * SCORES, bias, routed, lane);
    }
    const float* const from = x + (i64)row * x_stride;
    float square = 0.0f;
    for (int first = warp > 0 ? warp - 1 : quads; first < quads; first += CONVERTERS * 4) {
        float4 y[4], w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int quad = first + n * CONVERTERS;
            y[n] = load_four(from, quad, columns, lane);
            if (norm) w[n] = load_four(norm, quad, columns, lane);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int quad = first + n * CONVERTERS;
            if (quad >= quads) break;
            if (norm) {
                square = fmaf(y[n].x, y[n].x, fmaf(y[n].y, y[n].y, square));
                square = fmaf(y[n].z, y[n].z, fmaf(y[n].w, y[n].w, square));
                y[n].x *= w[n].x, y[n].y *= w[n].y, y[n].z *= w[n].z, y[n].w *= w[n].w;
            }
            converter.put(y[n], quad, lane);
        }
    }
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    const int expert = routed.ids[place], tile = blockIdx.x * TEAMS + team;
    const int begin = member * chunks / SPLIT, count = tile < tiles ? (member + 1) * chunks / SPLIT - begin : 0;
    const u8* const source = data + ((expert * (i64)tiles + tile) * chunks + begin) * FORMAT0::CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) stream.put(i, source + (i64)i * FORMAT0::CHUNK_BYTES, i < count, lane);
    if (weigh_input && warp == 0) weigh_chosen(bias, weight_scale, shared_scale, routed, lane);

    const Inputs in = converter.inputs(quads);
    Sums acc;
    acc[0][0][0] = acc[0][0][1] = 0.0f;
    Columns of_x;
    of_x.clear();
    for (int i = 0; i < count; ++i) {
        add_chunk<FORMAT0>(stream.take(), (begin + i) * QUADS, in, lane, of_x, acc);
        __syncwarp();
        stream.put(stream.slot, source + (i64)(i + DEPTH) * FORMAT0::CHUNK_BYTES, i + DEPTH < count, lane);
        stream.next();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v = acc[0][0][r];
        v += __shfl_xor_sync(FULL_MASK, v, 1);
        v += __shfl_xor_sync(FULL_MASK, v, 2);
        if ((lane & 3) == 0) partial[warp * 16 + r * 8 + (lane >> 2)] = v;
    }
    __syncthreads();
    const int of_team = threadIdx.x >> 3, at = threadIdx.x & 7, out_row = (blockIdx.x * TEAMS + of_team) * 8 + at;
    if (of_team >= TEAMS || blockIdx.x * TEAMS + of_team >= tiles || out_row >= rows) return;
    float gate = 0.0f, up = 0.0f, factor = 1.0f;
#pragma unroll
    for (int w = 0; w < SPLIT; ++w) {
        gate += partial[(of_team * SPLIT + w) * 16 + at];
        up += partial[(of_team * SPLIT + w) * 16 + 8 + at];
    }
    if (norm) {
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) all += squares[w];
        factor = rsqrtf(fmaf(all, one_column, eps));
    }
    if (scale) factor *= scale[0];
    if (weigh_input) factor *= routed.weights[place];
    gate *= factor, up *= factor;
    if (gate_bias) gate += gate_bias[(i64)expert * rows + out_row];
    if (up_bias) up += up_bias[(i64)expert * rows + out_row];
    h[(i64)pair * rows + out_row] = gated(gate, up);
}

// out[row] (+)= sum over its pairs, in their order, of weight * (down_e h[pair] + bias_e). grid: (tiles, rows).
// The columns of all its experts are one long sum, dealt to the warps in chunks. The experts are the row of ids, with
// weights of 1; or, with ids null, moe_gate_up's, found once more: so their weights travel while that still computes. A
// row with positions[row] < 0 is left alone. Before the wait everything but h is read, out as well: it has to be older
// than the launch before this one.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    moe_down(const u8* data, const float* scale, int tiles, int rows, int columns, const int* ids, const float* scores,
             const float* router_bias, float weight_scale, float shared_scale, const int* positions, int weigh,
             const float* h, const float* bias, float* out, int out_stride, int add) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Routed routed;
    constexpr int QUADS = FORMAT0::COLUMNS / 128, TOGETHER = 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile = blockIdx.x, row = blockIdx.y;
    const int chunks = (columns + FORMAT0::COLUMNS - 1) / FORMAT0::COLUMNS, units = PLACES * chunks;
    const int begin = warp * units / WARPS, count = (warp + 1) * units / WARPS - begin, most = (units + WARPS - 1) / WARPS;
    u64* const barriers = (u64*)(shared + WARPS * DEPTH * SLOT);
    float* const partial = (float*)(barriers + (WARPS * DEPTH + 1) / 2 * 2);  // [warp][16]
    Converter converter((u8*)(partial + WARPS * 16) + warp * (most * QUADS * QUAD_BYTES), most * QUADS);
    if (positions && positions[row] < 0) {
        pdl_wait();
        return;
    }
    Stream stream;
    stream.open(shared, barriers, warp, lane);
    bring_grids();
    if (warp == 0) {
        if (!ids) choose_experts(scores + (i64)row * SCORES, router_bias, routed, lane);
        else if (lane < PLACES) routed.ids[lane] = ids[(i64)row * PLACES + lane];
    }
    __syncthreads();
    auto put = [&](int slot, int i) {
        const int unit = begin + (i < count ? i : 0);
        const i64 chunk = (routed.ids[unit / chunks] * (i64)tiles + tile) * chunks + unit % chunks;
        stream.put(slot, data + chunk * FORMAT0::CHUNK_BYTES, i < count, lane);
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) put(i, i);
    const int out_row = tile * 16 + threadIdx.x;
    float before = 0.0f;
    if (add && threadIdx.x < 16 && out_row < rows) before = __ldcg(out + (i64)row * out_stride + out_row);
    if (warp == 0) {
        if (weigh) weigh_chosen(router_bias, weight_scale, shared_scale, routed, lane);
        else routed.weights[lane] = 1.0f;
    }
    __syncthreads();
    pdl_wait();
    for (int first = 0; first < count; first += TOGETHER) {
        float4 y[TOGETHER * QUADS];
#pragma unroll
        for (int n = 0; n < TOGETHER * QUADS; ++n) {
            const int unit = begin + min(first + n / QUADS, count - 1);
            const float* const from = h + ((i64)row * PLACES + unit / chunks) * columns;
            y[n] = load_four(from, unit % chunks * QUADS + n % QUADS, columns, lane);
        }
#pragma unroll
        for (int n = 0; n < TOGETHER * QUADS; ++n)
            if (first + n / QUADS < count) converter.put(y[n], first * QUADS + n, lane);
    }
    __syncwarp();
    pdl_launch();

    const Inputs in = converter.inputs(most * QUADS);
    float total[2] = {0.0f, 0.0f};
    Columns of_x;
    of_x.clear();
    for (int i = 0; i < count; ++i) {
        const int pair = (begin + i) / chunks;
        Sums acc;
        acc[0][0][0] = acc[0][0][1] = 0.0f;
        add_chunk<FORMAT0>(stream.take(), i * QUADS, in, lane, of_x, acc);
        const float weight = routed.weights[pair];
        total[0] = fmaf(weight, acc[0][0][0], total[0]);
        total[1] = fmaf(weight, acc[0][0][1], total[1]);
        __syncwarp();
        put(stream.slot, i + DEPTH);
        stream.next();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v = total[r];
        v += __shfl_xor_sync(FULL_MASK, v, 1);
        v += __shfl_xor_sync(FULL_MASK, v, 2);
        if ((lane & 3) == 0) partial[warp * 16 + r * 8 + (lane >> 2)] = v;
    }
    __syncthreads();
    if (threadIdx.x >= 16 || out_row >= rows) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[w * 16 + threadIdx.x];
    if (scale) sum *= scale[0];
    if (bias)
        for (int k = 0; k < PLACES; ++k)
            sum += routed.weights[k] * bias[(i64)routed.ids[k] * rows + out_row];
    out[(i64)row * out_stride + out_row] = before + sum;
}
