// Experts times the rows of a step that chose each, from packed weights: a run of up to 3 groups of 8 pairs reads its expert
// once, and unpacks it once.
//
// Single warps multiply with mma.sync (moe_rows_columns.cuh). Each streams its own chunks through DEPTH slots of SLOT bytes
// of shared memory. A block has a range of tiles, of one run after the other; SPLIT warps share the columns of a tile.
// Inputs: a group takes INPUT_BYTES for 256 columns. Blocks of 512 bytes, lane (pair * 4 + t) by lane 16 bytes: of 32 columns
// the halfs 4t, 4t + 2, 4t + 1, 4t + 3 of the first 16 and of the other 16; eight of those, then two of sums: float32 of
// columns 32t + 8i .. of 128.
// With PAGES, what a block multiplies is in shared memory, PAGES groups at a time; else the caches hold it.
// Order of every sum, whatever else is in a run: the SPLIT runs of chunks, each in steps of 16 columns, then 0..SPLIT-1.
// Defines: FORMAT0, ACTIVATION (activation.py's KernelActivation), WARPS, SPLIT, DEPTH, SLOT, PAGES.

constexpr int TEAMS = WARPS / SPLIT, PIECES = FORMAT0::COLUMNS / 128;
constexpr int RING = WARPS * DEPTH * SLOT, RUN = 3, WAITS = 4;  // RUN: most groups of a run
constexpr int UNPACKING = 1;  // what a tile costs beside its groups, in groups: blocks are cut by cost
static_assert(PAGES == 0 || (PAGES >= RUN && PAGES <= WAITS), "a run has to fit");

// table: [0] the number of runs, [1] that of groups; then of each run its expert + pairs << 16 and its first group.
struct Runs {
    const int* table;
    int count;
    __device__ __forceinline__ int2 at(int i) const { return *(const int2*)(table + 2 + i * 2); }
    __device__ __forceinline__ int begin(int i) const { return table[3 + i * 2]; }
    __device__ __forceinline__ int end(int i) const {
        const int2 v = at(i);
        return v.y + ((v.x >> 16) + 7) / 8;
    }
    // The first tile, counted over all runs, of each of two parts of the work.
    __device__ __forceinline__ void cut(int tiles, int part, int parts, int lane, int& first, int& last) const {
        const i64 total = ((i64)UNPACKING * count + table[1]) * tiles;
        const i64 from = part * total / parts, to = (part + 1) * total / parts;
        int before = 0, inside = 0;
        for (int i = 0; i < count; i += 32) {
            const int r = i + lane;
            const i64 cost = r < count ? (i64)(UNPACKING * r + begin(r)) * tiles : total + 1;
            before += __popc(__ballot_sync(FULL_MASK, cost <= from));
            inside += __popc(__ballot_sync(FULL_MASK, cost <= to));
        }
        first = place(before - 1, from, tiles), last = place(inside - 1, to, tiles);
    }
    __device__ __forceinline__ int place(int run, i64 cost, int tiles) const {
        if (run < 0) return 0;
        const int own = begin(run), each = UNPACKING + end(run) - own;
        const int left = (int)(cost - (i64)(UNPACKING * run + own) * tiles);
        return run * tiles + min(tiles, (left + each - 1) / each);
    }
};

// The chunks of a tile for `count` groups, then store(expert, pairs, group, sums) for each: a lane (g, t) has rows g and
// g + 8 of the tile for pairs 2t and 2t + 1.
template <int N, class Take, class Drop, class Join, class Store>
DEVICE void multiply_tile(const u8* x, int last, int stride, int first_page, int begin, int chunks, int lane, u32 magic,
                          Take take, Drop drop, Join join, Store store) {
    const u8* of[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
        int page = first_page + j;
        if (PAGES && page >= PAGES) page -= PAGES;
        of[j] = x + (i64)page * stride + (PAGES || j < N - 1 ? lane * 16 : last);
    }
    float sums[N][Columns<FORMAT0>::SUMS] = {};
    for (int chunk = begin; chunk < begin + chunks; ++chunk) {
        Columns<FORMAT0>::add(take(), of, lane, magic, sums);
        // Of formats with half as wide chunks, two have one block of inputs.
        const int step = PIECES == 2 ? INPUT_BYTES : chunk & 1 ? INPUT_BYTES - 2048 : 2048;
#pragma unroll
        for (int j = 0; j < N; ++j) of[j] += step;
        drop();
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        float4 v = Columns<FORMAT0>::finish(sums[j]);
        if (join(v)) store(j, v);
    }
}

template <class Store>
DEVICE void multiply_tiles(const u8* data, int tiles, int chunks, const int* table, const u8* operand, Store store) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / SPLIT, member = warp % SPLIT;
    const int page = (chunks * FORMAT0::COLUMNS + 255) / 256 * INPUT_BYTES;
    u8* const pool = shared + RING;
    u8* const rest = pool + PAGES * page;
    const u32 ring = shared_address(shared) + warp * (DEPTH * SLOT);
    const u32 barriers = shared_address(rest) + warp * DEPTH * 8, there = shared_address(rest) + WARPS * DEPTH * 8;
    int* const released = (int*)(rest + WARPS * DEPTH * 8 + WAITS * 8);
    float4* const partial = (float4*)(rest + WARPS * DEPTH * 8 + WAITS * 16);  // [warp][lane]
    if (lane == 0)
        for (int i = 0; i < DEPTH; ++i) barrier_init(barriers + i * 8, 1);
    if (PAGES && threadIdx.x < WAITS) barrier_init(there + threadIdx.x * 8, 1), released[threadIdx.x] = 0;
    publish_barriers();
    if (PAGES) __syncthreads();
    else __syncwarp();
    pdl_wait();
    const Runs runs = {table, table[0]};
    int first, end;
    runs.cut(tiles, blockIdx.x, gridDim.x, lane, first, end);
    const int begin = member * chunks / SPLIT, count = (member + 1) * chunks / SPLIT - begin;
    const int first_run = first / tiles, last_run = (end - 1) / tiles;

    // With PAGES: group i is in page i % PAGES from when the groups PAGES before it are released.
    auto bring = [&](int run) {
        const int from = runs.begin(run), to = runs.end(run);
        const u32 barrier = there + ((run - first_run) % WAITS) * 8;
        barrier_expect(barrier, (to - from) * page);
        for (int i = from; i < to; ++i)
            bulk_copy<false>(shared_address(pool) + i % PAGES * page, operand + (i64)i * page, page, barrier);
    };
    auto fitting = [&](int run) {  // the run behind those that fit together from `run` on
        const int from = runs.begin(run);
        int next = run + 1;
        while (next <= last_run && runs.end(next) - from <= PAGES) ++next;
        return next;
    };
#if PAGES
    if (threadIdx.x == 0 && first < end) {
        const int next = fitting(first_run);
        for (int i = first_run; i < next; ++i) bring(i);
    }
    int run = first_run;
    auto wait_for = [&](int wanted) {
        const int i = wanted - first_run;
        barrier_wait(there + i % WAITS * 8, (i / WAITS) & 1);
    };
    // Every warp does so for every run, in order; the last one brings what fits now.
    auto release = [&](int old) {
        __syncwarp();
        if (lane) return;
        __threadfence_block();
        const int index = (old - first_run) % WAITS;
        if (atomicAdd(released + index, 1) % WARPS != WARPS - 1 || old == last_run) return;
        __threadfence_block();
        const int next = fitting(old + 1);
        for (int i = fitting(old); i < next; ++i) bring(i);
    };
#endif

    // The producer runs DEPTH chunks ahead, over tiles and groups.
    int next = first + team, left = 0;
    const u8* source = nullptr;
    auto produce = [&](int slot) {
        if (lane) return;
        if (left == 0) {
            if (next >= end || count == 0) return;
            const int of = next / tiles;
            const int expert = runs.at(of).x & 0xffff;
            source = data + ((expert * (i64)tiles + next - of * tiles) * chunks + begin) * FORMAT0::CHUNK_BYTES;
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
    const u8* const slots = shared + warp * (DEPTH * SLOT);
    int slot = 0;
    u32 parity = 0;
    auto take = [&]() {
        barrier_wait(barriers + slot * 8, parity);
        return slots + slot * SLOT;
    };
    auto drop = [&]() {
        __syncwarp();
        produce(slot);
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    };
#if PAGES
    if (first < end) wait_for(run);
#endif
    for (int index = first + team; index < end; index += TEAMS) {
        const int of = index / tiles;
        const int2 entry = runs.at(of);
        const int pairs = entry.x >> 16, groups = (pairs + 7) / 8;
#if PAGES
        for (; run < of; ++run) release(run), wait_for(run + 1);
        const u8* const x = pool;
        const int first_page = entry.y % PAGES;
#else
        const u8* const x = operand;
        const int first_page = entry.y;
#endif
        const u8* const own = x + (PIECES == 2 ? begin * INPUT_BYTES : (begin >> 1) * INPUT_BYTES + (begin & 1) * 2048);
        // Lanes of pairs that the last group does not have do as its last one.
        const int last = (min(lane >> 2, (pairs - 1) % 8) * 4 + (lane & 3)) * 16;
        auto join = [&](float4& sums) {
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
            return member == 0;
        };
        auto give = [&](int j, float4 sums) {
            store(entry.x & 0xffff, min(8, pairs - j * 8), entry.y + j, index - of * tiles, sums);
        };
        if (groups == 1) multiply_tile<1>(own, last, page, first_page, begin, count, lane, magic, take, drop, join, give);
        else if (groups == 2) multiply_tile<2>(own, last, page, first_page, begin, count, lane, magic, take, drop, join, give);
        else multiply_tile<3>(own, last, page, first_page, begin, count, lane, magic, take, drop, join, give);
    }
#if PAGES
    if (first < end)
        for (; run < last_run; ++run) release(run), wait_for(run + 1);
#endif
}

// hidden, the input of moe_rows_down: f(gate x + gate_bias) * (up x + up_bias). rows: of an expert's gate.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    moe_rows_gate_up(const u8* data, const float* scale, int tiles, int chunks, int rows, const int* table,
                     const u8* operand, const float* gate_bias, const float* up_bias, u8* hidden) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    multiply_tiles(data, tiles, chunks, table, operand, [&](int expert, int pairs, int group, int tile, float4 sums) {
        const float factor = (scale ? scale[0] : 1.0f) * Columns<FORMAT0>::UNDO;
        const int row = tile * 8 + g, c = row & 15;
        const float of_gate = gate_bias ? gate_bias[(i64)expert * rows + row] : 0.0f;
        const float of_up = up_bias ? up_bias[(i64)expert * rows + row] : 0.0f;
        u8* const at = hidden + (i64)group * ((rows + 255) / 256 * INPUT_BYTES) + (row >> 8) * INPUT_BYTES;
        u8* const halfs = at + ((row >> 5) & 7) * 512 + (c >> 2) * 16 + ((row >> 4) & 1) * 8 + ((c & 1) * 2 + ((c >> 1) & 1)) * 2;
        u16 two[2] = {saturated_half(gated(fmaf(sums.x, factor, of_gate), fmaf(sums.z, factor, of_up))),
                      saturated_half(gated(fmaf(sums.y, factor, of_gate), fmaf(sums.w, factor, of_up)))};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int pair = t * 2 + i;
            if (pair < pairs) *(u16*)(halfs + pair * 64) = two[i];
            float sum = half_to_float(two[i]);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, offset);
            if (g == 0 && pair < pairs)
                *(float*)(at + SUMS_AT + ((tile >> 4) & 1) * 512 + (pair * 4 + ((tile >> 2) & 3)) * 16 + (tile & 3) * 4) = sum;
        }
    });
}

// y[place] = down hidden[place] + bias. rows: of an expert.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    moe_rows_down(const u8* data, const float* scale, int tiles, int chunks, int rows, const int* table,
                  const u8* hidden, const float* bias, float* y) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    multiply_tiles(data, tiles, chunks, table, hidden, [&](int expert, int pairs, int group, int tile, float4 sums) {
        const float factor = (scale ? scale[0] : 1.0f) * Columns<FORMAT0>::UNDO;
        const int row = tile * 16 + g;
        const float low = bias ? bias[(i64)expert * rows + row] : 0.0f;
        const float high = bias ? bias[(i64)expert * rows + row + 8] : 0.0f;
        float* const at = y + ((i64)group * 8 + t * 2) * rows + row;
        if (t * 2 < pairs) at[0] = fmaf(sums.x, factor, low), at[8] = fmaf(sums.z, factor, high);
        if (t * 2 + 1 < pairs) at[rows] = fmaf(sums.y, factor, low), at[rows + 8] = fmaf(sums.w, factor, high);
    });
}
