// out = or += alpha * (x @ W.T + bias) for many rows x, straight from packed weights, on Hopper's tensor cores (wgmma).
//
// A block computes tiles of WGS * 64 weight rows ("outputs") by TOKENS rows of x. WGS warpgroups multiply: each warp
// unpacks one packed tile of 16 weight rows from shared memory into half registers (operand A) while the tensor cores
// work on the 64 columns before; operand B is x in shared memory. One more warpgroup only copies: weights as they are
// packed, a chunk of CHUNK columns of every packed tile at a time, and x, 64 columns at a time, each through its own ring.
// Two blocks of a cluster have the same tokens: each fetches half of x for both. Blocks stay for all their tiles.
// Bits: every output is one chain of sums over the columns in ascending groups of 16, whatever the tile shape.
// With PARTS > 1 the blocks of a cluster share the columns of one tile instead; each then adds the sums of all of them,
// in the order of their columns, for its share of the tokens.
// With EXPERTS, W is a stack of equal matrices, and each tile of tokens is multiplied by the one that a table names.
// Compile-time: EXPERTS, ACTIVATION, WGS, TOKENS, CLUSTER, PARTS, CHUNK, X_STAGES, W_STAGES, SLOT (bytes of a packed chunk), FORMAT0 .. and FORMATS.

constexpr int WARPS = WGS * 4, THREADS = (WGS + 1) * 128, STEPS = CHUNK / 64;
constexpr u32 X_BYTES = TOKENS * 128, W_BYTES = WARPS * SLOT, STAGED = TOKENS * 64;  // STAGED: per warpgroup
constexpr u32 W_AT = X_STAGES * X_BYTES, STAGED_AT = W_AT + W_STAGES * W_BYTES, BARRIERS_AT = STAGED_AT + WGS * STAGED;
constexpr u32 X_FULL = BARRIERS_AT, X_EMPTY = X_FULL + X_STAGES * 8, W_FULL = X_EMPTY + X_STAGES * 8;
constexpr u32 W_EMPTY = W_FULL + W_STAGES * 8;
constexpr int EIGHTS = TOKENS / 8, LEFT = (EIGHTS + PARTS - 1) / PARTS * 8;  // tokens whose sums a block finishes, at most
constexpr u32 WRITTEN = W_EMPTY + W_STAGES * 8, READ = WRITTEN + 8;  // only with PARTS > 1, like the sums behind them
constexpr u32 SUMS_AT = (READ + 8 + 127) / 128 * 128;
static_assert(X_BYTES % 1024 == 0 && SLOT % 16 == 0 && STEPS % 2 == 0, "alignment; operand buffers alternate");
static_assert(PARTS == 1 || (CLUSTER == 1 && !EXPERTS), "a cluster has one use");

enum Mode { STORE = 0, ADD = 1, GATED = 2, GATED_OPERAND = 3 };

// A matrix of the launch; `tiles` of 16 rows. Written by gemm.py.
struct Segment {
    const u8* data;
    const float* scale;  // what undoes the scaling of the whole matrix, or null
    int tiles, rows, column, format;
    i64 chunk_bytes;
};

// The order of tiles: groups of GROUP token tiles, in a group all tokens of a pair of output tiles first.
struct Schedule {
    static constexpr int GROUP = 16;
    int across, down, total;  // token tiles; clusters of output tiles
    __device__ __forceinline__ Schedule(int token_tiles, int output_tiles)
        : across(token_tiles), down((output_tiles + CLUSTER - 1) / CLUSTER), total(across * down) {}
    __device__ __forceinline__ void place(int index, int& token_tile, int& output_tile) const {
        const int group = index / (down * GROUP), first = group * GROUP, within = index - first * down;
        const int size = min(GROUP, across - first);
        token_tile = first + within % size;
        output_tile = within / size * CLUSTER + (CLUSTER > 1 ? cluster_rank() : 0);
    }
};

// The segment of 64 output rows, and their place in it.
DEVICE Segment find(const Segment* segments, int unit, int& local) {
    Segment s = segments[0];
    int units = (s.tiles + 3) >> 2;
    for (int i = 1; unit >= units; ++i) {
        unit -= units;
        s = segments[i];
        units = (s.tiles + 3) >> 2;
    }
    local = unit;
    return s;
}

struct Ring {
    u32 stage = 0, parity = 0;
    template <int STAGES>
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1u;
    }
};

// ---- copying warps -------------------------------------------------------------------------------------------------
DEVICE void fetch_weights(u32 base, const Segment* segments, int units, int chunks, int begin, int end,
                          const int* experts, const Schedule& schedule, int lane) {
    Ring ring;
    for (int index = blockIdx.x / (CLUSTER * PARTS); index < schedule.total; index += gridDim.x / (CLUSTER * PARTS)) {
        int token_tile, output_tile;
        schedule.place(index, token_tile, output_tile);
        const int unit = output_tile * WGS + (lane >> 2);
        const u8* source = nullptr;
        u32 bytes = 0;
        if (lane < WARPS && unit < units) {
            int local;
            const Segment s = find(segments, unit, local);
            const int tile = local * 4 + (lane & 3) + (EXPERTS ? experts[1 + token_tile] * units * 4 : 0);
            if (tile < s.tiles) {
                bytes = (u32)s.chunk_bytes;
                source = s.data + ((i64)tile * chunks + begin) * bytes;
            }
        }
        const u32 total = __reduce_add_sync(FULL_MASK, bytes);
        for (int chunk = begin; chunk < end; ++chunk) {
            barrier_wait(base + W_EMPTY + ring.stage * 8, ring.parity ^ 1u);
            const u32 full = base + W_FULL + ring.stage * 8;
            if (lane == 0) barrier_expect(full, total);
            __syncwarp();
            if (bytes) bulk_copy<false>(base + W_AT + ring.stage * W_BYTES + lane * SLOT, source, bytes, full);
            source += bytes;
            ring.next<W_STAGES>();
        }
    }
}

// x: blocks of 64 columns, each of `pitch` rows of 128 bytes.
DEVICE void fetch_x(u32 base, const u8* x, int pitch, int begin, int end, const Schedule& schedule) {
    constexpr int SHARE = TOKENS / CLUSTER;
    const int from = CLUSTER > 1 ? cluster_rank() * SHARE : 0;
    Ring ring;
    for (int index = blockIdx.x / (CLUSTER * PARTS); index < schedule.total; index += gridDim.x / (CLUSTER * PARTS)) {
        int token_tile, output_tile;
        schedule.place(index, token_tile, output_tile);
        const int first = token_tile * TOKENS, rows = min(TOKENS, pitch - first), mine = min(SHARE, rows - from);
        const u8* source = x + (i64)(first + from) * 128 + (i64)begin * pitch * 128;
        for (int step = begin; step < end; ++step) {
            barrier_wait(base + X_EMPTY + ring.stage * 8, ring.parity ^ 1u);
            const u32 full = base + X_FULL + ring.stage * 8, target = base + ring.stage * X_BYTES + from * 128;
            barrier_expect(full, rows * 128);
            if (mine > 0) {
                if (CLUSTER > 1)
                    bulk_copy_to_cluster(target, source, mine * 128, full, (1u << CLUSTER) - 1u);
                else
                    bulk_copy<false>(target, source, mine * 128, full);
            }
            source += (i64)pitch * 128;
            ring.next<X_STAGES>();
        }
    }
}

// ---- multiplying warps ---------------------------------------------------------------------------------------------
typedef float Sums[TOKENS / 2];

DEVICE void release_x(u32 base, u32 stage, int lane) {
    if (CLUSTER > 1) {
        if (lane < CLUSTER) barrier_arrive_at(base + X_EMPTY + stage * 8, lane);
    } else if (lane == 0) {
        barrier_arrive(base + X_EMPTY + stage * 8);
    }
}

// The compiler must not move the making of operands past this point, nor give their registers away before it: it does not
// know that the tensor cores read them until the wait.
DEVICE void pin(Operands& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

template <class F>
DEVICE void multiply(u32 base, const u8* pool, int chunks, int warp, int lane, Ring& x, Ring& w, Sums& sums) {
    const u32 magic = hidden_constant(0x64006400u);
    Operands operands[2] = {};
    HalfOperands<F, F::LOW> packed;
    ChunkScales<F> scales;
    int accumulate = 0;
    u32 last = 0;
    const u8* const place = pool + W_AT + warp * SLOT;
    barrier_wait(base + W_FULL + w.stage * 8, w.parity);
    scales.load(place + w.stage * W_BYTES, lane, magic);
    packed.load(place + w.stage * W_BYTES, 0, lane);
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            Operands& a = operands[step & 1];
            packed.make(scales, step, lane, magic, a);
            pin(a);
            // The loads of the next step, ahead of everything that waits.
            const u32 stage = w.stage;
            if (step < STEPS - 1) {
                packed.load(place + stage * W_BYTES, step + 1, lane);
            } else {
                w.next<W_STAGES>();
                if (chunk + 1 < chunks) {
                    barrier_wait(base + W_FULL + w.stage * 8, w.parity);
                    scales.load(place + w.stage * W_BYTES, lane, magic);
                    packed.load(place + w.stage * W_BYTES, 0, lane);
                }
            }
            barrier_wait(base + X_FULL + x.stage * 8, x.parity);
            const u64 b = matrix_at((base + x.stage * X_BYTES) & 0x3ffffu, 16);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                product_of_registers<TOKENS, 0>(sums, a[k], b + 2 * k, accumulate);
                accumulate = 1;
            }
            wgmma_commit();
            if (step == STEPS - 1) {
                // Only here: what was loaded is certain to be in registers once a multiplication uses it. An arrival right
                // behind the loads let the next chunk overwrite them while the tensor cores kept shared memory busy.
                __syncwarp();
                if (lane == 0) barrier_arrive(base + W_EMPTY + stage * 8);
            }
            wgmma_wait<1>();  // the step before this one: its half of the operands and its x are free
            pin(operands[(step & 1) ^ 1]);
            if (chunk || step) release_x(base, last, lane);
            last = x.stage;
            x.next<X_STAGES>();
        }
    }
    wgmma_wait<0>();
    pin(operands[1]);
    release_x(base, last, lane);
}

template <class F>
DEVICE float run(u32 base, const u8* pool, int chunks, int warp, int lane, Ring& x, Ring& w, Sums& sums) {
    multiply<F>(base, pool, chunks, warp, lane, x, w, sums);
    return HalfScales<F>::UNDO;
}

#if PARTS > 1
// Adds the sums of all blocks of the cluster for a block's own share of the tokens. Every block writes all of its sums to
// its shared memory, arrives at everybody's barrier, reads its share everywhere, and says so before they are overwritten.
DEVICE void share_sums(u32 base, u8* pool, int part, int warp, int lane, u32 turn, const Sums& sums, float (&left)[LEFT / 2]) {
    float* const own = (float*)(pool + SUMS_AT) + warp * (TOKENS / 2 * 32) + lane;
    barrier_wait_cluster(base + READ, turn ^ 1u);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) own[i * 32] = sums[i];
    __syncwarp();
    if (lane < PARTS) barrier_arrive_cluster(base + WRITTEN, lane);
    barrier_wait_cluster(base + WRITTEN, turn);
    const u32 mine = base + SUMS_AT + ((warp * (TOKENS / 2) + EIGHTS * part / PARTS * 4) * 32 + lane) * 4;
#pragma unroll
    for (int other = 0; other < PARTS; ++other) {
#pragma unroll
        for (int i = 0; i < LEFT / 2; ++i) {
            const float value = float_from_rank(mine + i * 128, other);
            left[i] = other ? left[i] + value : value;
        }
    }
    __syncwarp();
    if (lane < PARTS) barrier_arrive_cluster(base + READ, lane);
}
#endif

// The hidden vectors of a paired tile (64 rows: 32 columns of the next product's x) through shared memory, 16 bytes a piece.
template <int N>
DEVICE void store_operand(u8* staged, u8* out, int pitch, int first, int tokens, int column, int width,
                          const float (&sums)[N / 2], float factor, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3, inside = warp & 3, id = 1 + (warp >> 2);
    named_barrier(id, 128);  // the tile before has been read
    const int place = (inside & 1) * 4 + (place_of_column(g) & 7), unit = (inside >> 1) * 2 + (g & 1);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = j * 8 + t * 2 + e;
            const float value = activate_fast(sums[j * 4 + e] * factor) * (sums[j * 4 + 2 + e] * factor);
            *(u16*)(staged + token * 64 + ((unit ^ ((token >> 1) & 3)) * 16) + place * 2) =
                saturated_half(value);
        }
    named_barrier(id, 128);
    for (int i = inside * 32 + lane; i < N * 4; i += 128) {
        const int token = i >> 2, piece = i & 3, row = first + token, at = column + piece * 8;
        if (row >= tokens || at >= width) continue;
        const uint4 v = *(const uint4*)(staged + token * 64 + ((piece ^ ((token >> 1) & 3)) * 16));
        *(uint4*)(out + ((i64)(at >> 6) * pitch + row) * 128 + ((((at >> 3) & 7) ^ (row & 7)) * 16)) = v;
    }
}

DEVICE void store_four(float* to, const float (&v)[4], bool add) {
    if (add)
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                     : "memory");
    else
        *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
}

// Of four lanes that differ in bits 2 and 3, lane i gets number i of each: v[k] becomes number i of lane k.
DEVICE void transpose_four(float (&v)[4], int lane) {
#pragma unroll
    for (int bit = 0; bit < 2; ++bit) {
        const bool upper = lane >> (2 + bit) & 1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& low = v[bit ? i : 2 * i];
            float& high = v[bit ? i + 2 : 2 * i + 1];
            const float got = __shfl_xor_sync(FULL_MASK, upper ? low : high, 4 << bit);
            low = upper ? got : low;
            high = upper ? high : got;
        }
    }
}

// Rows `row` and `row` + 8 of the segment. Adding is left to the cache: nothing waits for the old value. Four outputs of a
// token at a time where all places allow it, which takes a quarter of the stores.
template <int N>
DEVICE void store_floats(float* out, int stride, int first, int tokens, const float* bias, const Segment& s, int row, int t,
                         const float (&sums)[N / 2], float factor, float alpha, bool add) {
    const int lane = threadIdx.x & 31, number = lane >> 2 & 3;  // of the four lanes that exchange
    const bool fours = N % 16 == 0 && ((stride | s.column | s.rows) & 3) == 0 && ((u64)out & 15) == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int mine = row + half * 8, column = s.column + mine;
        const bool inside = mine < s.rows;
        const float more = bias && inside ? bias[column] : 0.0f;
        auto value = [&](int j, int e) { return (sums[j * 4 + half * 2 + e] * factor + more) * alpha; };
        if (fours) {
            const int token = first + t * 2 + (number >> 1) * 8 + (number & 1);
            float* const at = out + (i64)token * stride + (column & ~3);
#pragma unroll
            for (int j = 0; j < N / 16; ++j) {
                float v[4] = {value(j * 2, 0), value(j * 2, 1), value(j * 2 + 1, 0), value(j * 2 + 1, 1)};
                transpose_four(v, lane);
                if (inside && token + j * 16 < tokens) store_four(at + (i64)(j * 16) * stride, v, add);
            }
        } else if (inside) {
            float* const at = out + (i64)(first + t * 2) * stride + column;
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (first + t * 2 + j * 8 + e >= tokens) continue;
                    float* const target = at + (i64)(j * 8 + e) * stride;
                    if (add)
                        asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(value(j, e)) : "memory");
                    else
                        *target = value(j, e);
                }
        }
    }
}

// segments: device memory. units: runs of 64 output rows over all segments. chunks: of CHUNK columns.
// experts: with EXPERTS, one segment of stacked matrices, each of `units`; table of group_rows (experts.cu).
// x: operand_half's layout, pitch rows. out: float32, rows of `stride`; GATED_OPERAND: operand layout, `stride` its pitch.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if CLUSTER * PARTS > 1
    __cluster_dims__(CLUSTER * PARTS, 1, 1)
#endif
    gemm(const Segment* segments, int units, int chunks, const u8* x, int pitch, int tokens, void* out, int stride,
         const float* bias, float alpha, int mode, const int* experts) {
    extern __shared__ u8 unaligned[];
    const u32 base = (shared_address(unaligned) + 1023u) & ~1023u;
    u8* const pool = unaligned + (base - shared_address(unaligned));
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int part = PARTS > 1 ? (int)cluster_rank() : 0, begin = chunks * part / PARTS, end = chunks * (part + 1) / PARTS;
    if (EXPERTS) pdl_wait();  // the table says how much there is to do
    const Schedule schedule(EXPERTS ? experts[0] : (tokens + TOKENS - 1) / TOKENS, (units + WGS - 1) / WGS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_STAGES; ++i) {
            barrier_init(base + X_FULL + i * 8, 1);
            barrier_init(base + X_EMPTY + i * 8, CLUSTER * WARPS);
        }
        for (int i = 0; i < W_STAGES; ++i) {
            barrier_init(base + W_FULL + i * 8, 1);
            barrier_init(base + W_EMPTY + i * 8, WARPS);
        }
        if (PARTS > 1) barrier_init(base + WRITTEN, PARTS * WARPS), barrier_init(base + READ, PARTS * WARPS);
        publish_barriers();
    }
    __syncthreads();
    if (CLUSTER * PARTS > 1) cluster_barrier();
    pdl_launch();
    if (warp >= WARPS) {
        if (WGS > 1) registers_fewer<WGS == 2 ? 40 : 32>();
        if (warp == WARPS) fetch_weights(base, segments, units, chunks, begin, end, experts, schedule, lane);
        if (warp == WARPS + 1 && lane == 0) {
            pdl_wait();
            fetch_x(base, x, pitch, begin * STEPS, end * STEPS, schedule);
        }
    } else {
        if (WGS > 1) registers_more<REGISTERS>();
        pdl_wait();
        Ring x_ring, w_ring;
        u32 turn = 0;
        for (int index = blockIdx.x / (CLUSTER * PARTS); index < schedule.total; index += gridDim.x / (CLUSTER * PARTS)) {
            int token_tile, output_tile, local = 0;
            schedule.place(index, token_tile, output_tile);
            const int unit = output_tile * WGS + (warp >> 2);
            Segment s = {nullptr, nullptr, 0, 0, 0, 0, 0};  // beyond the last: multiplies for nothing
            if (unit < units) s = find(segments, unit, local);
            Sums sums;
            float factor;
#if FORMATS > 1
            if (s.format) factor = run<FORMAT1>(base, pool, end - begin, warp, lane, x_ring, w_ring, sums);
            else
#endif
                factor = run<FORMAT0>(base, pool, end - begin, warp, lane, x_ring, w_ring, sums);
            if (s.scale) factor *= s.scale[0];
            const int tile = local * 4 + (warp & 3), start = token_tile * TOKENS, g = lane >> 2, t = lane & 3;
#if PARTS > 1
            const int first = start + EIGHTS * part / PARTS * 8, limit = min(tokens, start + EIGHTS * (part + 1) / PARTS * 8);
            float left[LEFT / 2];
            share_sums(base, pool, part, warp, lane, turn, sums, left);
            turn ^= 1u;
#else
            const int first = start, limit = tokens;
            const Sums& left = sums;
#endif
            if (mode == GATED_OPERAND) {
                store_operand<LEFT>(pool + STAGED_AT + (warp >> 2) * STAGED, (u8*)out, stride, first, limit, local * 32,
                              s.rows, left, factor, warp, lane);
            } else if (mode == GATED) {
                const int row = tile * 8 + g;
#pragma unroll
                for (int j = 0; j < LEFT / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int token = first + j * 8 + t * 2 + e;
                        const float value = activate_fast(left[j * 4 + e] * factor) * (left[j * 4 + 2 + e] * factor);
                        if (row < s.rows && token < limit) ((float*)out)[(i64)token * stride + row] = value;
                    }
            } else {
                store_floats<LEFT>((float*)out, stride, first, limit, bias, s, tile * 16 + g, t, left, factor, alpha, mode == ADD);
            }
        }
    }
    __syncthreads();
    if (CLUSTER * PARTS > 1) cluster_barrier();  // a block must not exit while other blocks still arrive at its barriers
}
