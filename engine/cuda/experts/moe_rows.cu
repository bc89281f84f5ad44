// Experts times the few rows that chose each, from packed weights: every group of up to 8 pairs reads its expert once.
//
// Weights become halfs in registers (gemm_unpack.cuh) and go to mma.sync with the halfs of a group's pairs, which the
// caches hold. Each warp streams its own chunks through DEPTH slots of SLOT bytes of shared memory. A block has a run of
// tiles, of one group after the other; SPLIT warps share the columns of a tile.
// Operands: a group takes 16 bytes a column, in blocks of 32 columns (512 bytes) lane (pair * 4 + t) by lane 16 bytes:
// columns 4t, 4t + 2, 4t + 1, 4t + 3 of the first 16 columns, then of the other 16.
// Order of every sum, whatever else is in a group: the SPLIT runs of chunks, each in steps of 16 columns; then 0..SPLIT-1.
// Defines: FORMAT0, ACTIVATION (activation.py's KernelActivation), WARPS, SPLIT, DEPTH, SLOT.

constexpr int TEAMS = WARPS / SPLIT, STEPS = FORMAT0::COLUMNS / 64;

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma16(c, a[0], a[1], a[2], a[3], b0, b1);
}

// The halfs of 64 columns, of this lane's column of the product.
struct Halves {
    uint4 v[2];
    __device__ __forceinline__ void load(const u8* at) {
        v[0] = *(const uint4*)at;
        v[1] = *(const uint4*)(at + 512);
    }
};

// Calls store(expert, pairs, place, tile, sums): a lane (g, t) has rows g and g + 8 of the tile for pairs 2t and 2t + 1.
template <class Store>
DEVICE void multiply_tiles(const u8* data, int tiles, int chunks, const int* table, const u8* operand, Store store) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / SPLIT, member = warp % SPLIT;
    const u32 ring = shared_address(shared) + warp * (DEPTH * SLOT);
    const u32 barriers = shared_address(shared) + WARPS * DEPTH * SLOT + warp * DEPTH * 8;
    float4* const partial = (float4*)(shared + WARPS * DEPTH * (SLOT + 8));  // [warp][lane]
    if (lane == 0) {
        for (int i = 0; i < DEPTH; ++i) barrier_init(barriers + i * 8, 1);
        publish_barriers();
    }
    __syncwarp();
    pdl_wait();
    const i64 all = (i64)table[0] * tiles;
    const int end = (int)((blockIdx.x + 1) * all / gridDim.x), first = (int)(blockIdx.x * all / gridDim.x) + team;
    const int begin = member * chunks / SPLIT, count = (member + 1) * chunks / SPLIT - begin;

    // The producer runs DEPTH chunks ahead, over tiles and groups.
    int next = first, left = 0;
    const u8* source = nullptr;
    auto produce = [&](int slot) {
        if (lane) return;
        if (left == 0) {
            if (next >= end || count == 0) return;
            const int group = next / tiles;
            const int expert = table[1 + group] & 0xffff;
            source = data + ((expert * (i64)tiles + next - group * tiles) * chunks + begin) * FORMAT0::CHUNK_BYTES;
            left = count;
            next += TEAMS;
        }
        const u32 barrier = barriers + slot * 8;
        barrier_expect(barrier, FORMAT0::CHUNK_BYTES);
        bulk_copy<true>(ring + slot * SLOT, source, FORMAT0::CHUNK_BYTES, barrier);
        source += FORMAT0::CHUNK_BYTES;
        --left;
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) produce(i);
    pdl_launch();

    const u32 magic = hidden_constant(0x64006400u);
    const i64 group_bytes = (i64)chunks * (FORMAT0::COLUMNS * 16);
    const u8* const slots = shared + warp * (DEPTH * SLOT);
    int slot = 0;
    u32 parity = 0;
    for (int index = first; index < end; index += TEAMS) {
        const int group = index / tiles, entry = table[1 + group], pairs = entry >> 16;
        // Lanes of pairs that the group does not have do as its last one.
        const u8* x = operand + group * group_bytes + (i64)begin * (FORMAT0::COLUMNS * 16) +
                      (min(lane >> 2, pairs - 1) * 4 + (lane & 3)) * 16;
        float even[4] = {}, odd[4] = {};
        Halves b;
        b.load(x);
        for (int chunk = 0; chunk < count; ++chunk) {
            barrier_wait(barriers + slot * 8, parity);
            const u8* const weights = slots + slot * SLOT;
            HalfOperands<FORMAT0, FORMAT0::LOW> packed;
            ChunkScales<FORMAT0> scales;
            scales.load(weights, lane, magic);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const Halves now = b;
                x += 1024;
                b.load(x);  // behind the last columns too: the operand does not end there
                Operands a;
                packed.load(weights, step, lane);
                packed.make(scales, step, lane, magic, a);
                multiply(even, a[0], now.v[0].x, now.v[0].y);
                multiply(odd, a[1], now.v[0].z, now.v[0].w);
                multiply(even, a[2], now.v[1].x, now.v[1].y);
                multiply(odd, a[3], now.v[1].z, now.v[1].w);
            }
            __syncwarp();
            produce(slot);
            if (++slot == DEPTH) slot = 0, parity ^= 1;
        }
        float4 sums = make_float4(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]);
        if (SPLIT > 1) {
            if (member) partial[warp * 32 + lane] = sums;
            named_barrier(1 + team, SPLIT * 32);
            if (member == 0)
#pragma unroll
                for (int w = 1; w < SPLIT; ++w) {
                    const float4 v = partial[(warp + w) * 32 + lane];
                    sums.x += v.x, sums.y += v.y, sums.z += v.z, sums.w += v.w;
                }
            named_barrier(1 + team, SPLIT * 32);
        }
        if (member == 0) store(entry & 0xffff, pairs, group, index - group * tiles, sums);
    }
}

// hidden, the operand of moe_rows_down: f(gate x + gate_bias) * (up x + up_bias). rows: of an expert's gate.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    moe_rows_gate_up(const u8* data, const float* scale, int tiles, int chunks, int rows, const int* table,
                     const u8* operand, const float* gate_bias, const float* up_bias, u8* hidden) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    multiply_tiles(data, tiles, chunks, table, operand, [&](int expert, int pairs, int group, int tile, float4 sums) {
        const float factor = (scale ? scale[0] : 1.0f) * HalfScales<FORMAT0>::UNDO;
        const int row = tile * 8 + g, c = row & 15;
        const float of_gate = gate_bias ? gate_bias[(i64)expert * rows + row] : 0.0f;
        const float of_up = up_bias ? up_bias[(i64)expert * rows + row] : 0.0f;
        u8* const at = hidden + (i64)group * rows * 16 + (row >> 5) * 512 + (c >> 2) * 16 + ((row >> 4) & 1) * 8 +
                       ((c & 1) * 2 + ((c >> 1) & 1)) * 2;
        const float first = gated(fmaf(sums.x, factor, of_gate), fmaf(sums.z, factor, of_up));
        const float second = gated(fmaf(sums.y, factor, of_gate), fmaf(sums.w, factor, of_up));
        if (t * 2 < pairs) *(u16*)(at + t * 128) = saturated_half(first);
        if (t * 2 + 1 < pairs) *(u16*)(at + t * 128 + 64) = saturated_half(second);
    });
}

// y[place] = down hidden[place] + bias. rows: of an expert.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    moe_rows_down(const u8* data, const float* scale, int tiles, int chunks, int rows, const int* table,
                  const u8* hidden, const float* bias, float* y) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    multiply_tiles(data, tiles, chunks, table, hidden, [&](int expert, int pairs, int group, int tile, float4 sums) {
        const float factor = (scale ? scale[0] : 1.0f) * HalfScales<FORMAT0>::UNDO;
        const int row = tile * 16 + g;
        const float low = bias ? bias[(i64)expert * rows + row] : 0.0f;
        const float high = bias ? bias[(i64)expert * rows + row + 8] : 0.0f;
        float* const at = y + ((i64)group * 8 + t * 2) * rows + row;
        if (t * 2 < pairs) at[0] = fmaf(sums.x, factor, low), at[8] = fmaf(sums.z, factor, high);
        if (t * 2 + 1 < pairs) at[rows] = fmaf(sums.y, factor, low), at[rows + 8] = fmaf(sums.w, factor, high);
    });
}
