// Quantized matrix times 1..8 vectors, straight from the packed layouts of formats.cuh.
//
// Defines: SEGMENTS matrices of FORMATS formats FORMAT0.. (FORMAT_OF, CHUNK_BYTES_OF, CHUNK_COLUMNS_OF per matrix);
// NB sequences per mma and GROUPS_OF_NB such groups; WARPS of a block, SPLIT of them share the columns of one tile (a
// team); each warp streams its own chunks through DEPTH slots of SLOT bytes of shared memory.
//
// mma.sync m16n8k16: 16 weight rows x 8 columns of activations. A sequence takes two columns: x = high + low halfs.
// With fewer than 4 sequences the free columns take other sub-blocks (R = 4/NB of them) against zeros, so that every
// lane ends up with the sums of different sub-blocks and applies its scales to them once, in float32.
// 4-bit quants are used as the subnormal halfs q * 2^-24: one AND per two weights, nothing to subtract.
// x of every 128 columns is multiplied by a power of two so that halfs neither overflow nor lose bits.
//
// Order of every sum, whatever the batch: columns in slabs of 4096; within one, units of 256 (or 128) columns are dealt
// to the SPLIT warps; a lane sums sub-blocks of one residue mod 4, then (0+1)+(2+3), warps 0..SPLIT-1, slabs.

constexpr int R = 4 / NB, SEQUENCES = NB * GROUPS_OF_NB, TEAMS = WARPS / SPLIT;
constexpr int SLAB = 4096;

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- tensor cores --------------------------------------------------------------------------------------------
DEVICE void mma(float (&c)[4], const u32* a, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// ---- the stream of chunks ------------------------------------------------------------------------------------
DEVICE void barrier_init(u32 address) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
#endif
}

DEVICE void fetch(u32 slot, u32 barrier, const u8* source, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            ::"r"(slot), "l"(source), "r"(bytes), "r"(barrier), "l"(0x12f0000000000000ull)  // evict first
            : "memory");
    }
#elif __CUDA_ARCH__ >= 800
    for (int at = lane * 16; at < bytes; at += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot + at), "l"(source + at) : "memory");
#else
    for (int at = lane * 16; at < bytes; at += 512) {
        const uint4 v = load_stream(source + at);
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(slot + at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    }
#endif
}

// Closes one fetch, made or not; every lane calls it once per slot turn.
DEVICE void fetch_commit() {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

DEVICE void fetch_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\n"
        "bra.uni again;\n"
        "over:\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
#else
    __syncwarp();
#endif
}

DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- weights of one sub-block as mma operands ----------------------------------------------------------------
// 2^24 for the subnormal halfs, and the place of the bits in the half.
template <class F>
DEVICE float place_factor(int slot) {
    if (!F::SCALED) return 1.0f;
    const int down = F::LOW == 4 ? (slot & 1) * 4 : F::LOW == 2 ? slot * 2 : 0;
    return __uint_as_float((u32)(127 + 24 - down) << 23);
}

template <class F, int LOW>
struct Operand {  // 4 and 2 bits, with 0, 1 or 2 high bits
    uint4 low[LOW == 4 ? 2 : 1];
    u32 high[4];
    __device__ __forceinline__ void load(const u8* chunk, int quad, int lane) {
        const uint4* at = (const uint4*)(chunk + quad * F::QUAD_LOW) + lane;
        low[0] = at[0];
        if (LOW == 4) low[LOW == 4 ? 1 : 0] = at[32];
        const u8* plane = chunk + F::HIGH_AT + quad * F::QUAD_HIGH;
        if (F::HIGH == 2) {
            const uint4 v = ((const uint4*)plane)[lane];
            high[0] = v.x, high[1] = v.y, high[2] = v.z, high[3] = v.w;
        } else if (F::HIGH == 1) {
            const uint2 v = ((const uint2*)plane)[lane];
            high[0] = v.x, high[1] = v.y;
        }
    }
    __device__ __forceinline__ void get(int s, u32 (&a)[2][4]) const {
        const uint4 v = low[LOW == 4 ? s >> 1 : 0];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        const u32 mask = LOW == 4 ? ((s & 1) ? 0x00f000f0u : 0x000f000fu) : 0x00030003u << (2 * s);
        const u32 high_mask = (F::HIGH == 2 ? 0x00030003u : 0x00010001u) << high_target<LOW>(s);
#pragma unroll
        for (int w = 0; w < 2; ++w)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int row = n & 1, half = n >> 1;
                u32 v2 = (half ? words[row * 2 + w] >> 8 : words[row * 2 + w]) & mask;
                if (F::HIGH) {
                    const u32 h = high[F::HIGH == 2 ? (s >> 1) * 2 + row : LOW == 4 ? s >> 1 : row];
                    const int shift = high_shift<LOW, F::HIGH>(w, half, row);
                    v2 |= (shift > 0 ? h >> shift : h << -shift) & high_mask;
                }
                a[w][n] = v2;
            }
    }
};

template <class F>
struct Operand<F, 8> {
    const uint4* at;
    __device__ __forceinline__ void load(const u8* chunk, int quad, int lane) {
        at = (const uint4*)(chunk + quad * F::QUAD_LOW) + lane;
    }
    __device__ __forceinline__ void get(int s, u32 (&a)[2][4]) const {
        const uint4 v = at[s * 32];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int w = 0; w < 2; ++w)
#pragma unroll
            for (int n = 0; n < 4; ++n)
                a[w][n] = __byte_perm(words[(n & 1) * 2 + w], 0u, (n >> 1) ? 0x4342 : 0x4140);
    }
};

// ---- one chunk -----------------------------------------------------------------------------------------------
struct Inputs {
    u32 halves;            // shared address: [group][quad][NB][lane] 16 bytes
    const float2* sums;    // [group][sub-block][NB]: sums of its two 16s
    const float* scales;   // [group][quad][NB]: what undoes the power of two
    int quads;             // resident
};

typedef float Sums[GROUPS_OF_NB][NB][2];  // [group][slot / R][row]

// B operands of R sub-blocks. A lane's column belongs to one of them (its turn); its registers of the others are zero
// from the start and never written, which costs no instruction.
struct Columns {
    u32 v[GROUPS_OF_NB][R][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < GROUPS_OF_NB * R * 4; ++i) (&v[0][0][0])[i] = 0u;
    }
    __device__ __forceinline__ void load(const Inputs& in, int quad, int f, int lane) {
        const u32 turn = (lane >> 2) / (2 * NB);
#pragma unroll
        for (int j = 0; j < GROUPS_OF_NB; ++j) {
            const u32 at = in.halves + (((j * in.quads + quad) * NB + f) * 32 + lane) * 16;
#pragma unroll
            for (int k = 0; k < R; ++k) {
                u32(&x)[4] = v[j][k];
                if (R == 1)
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                                 : "r"(at));
                else
                    asm volatile(
                        "{\n.reg .pred mine;\nsetp.eq.u32 mine, %5, %6;\n@mine ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
                        : "r"(at), "r"(turn), "r"(k));
            }
        }
    }
};

template <class F, bool SCALED>
struct Chunk {
    DEVICE void add(const u8* chunk, int first_quad, const Inputs& in, int lane, Columns& x, Sums& acc) {
        const int g = lane >> 2, t = lane & 3, r = t / NB, b = t % NB;
        Scales scales[NB];
#pragma unroll
        for (int f = 0; f < NB; ++f) scales[f] = F::load(chunk, g, f * R + r);
#pragma unroll
        for (int quad = 0; quad < F::QUADS; ++quad) {
            Operand<F, F::LOW> operand;
            operand.load(chunk, quad, lane);
            const int at = first_quad + quad;
#pragma unroll
            for (int f = 0; f < NB; ++f) {
                float c[GROUPS_OF_NB][2][4];  // one chain per 16 columns of the sub-blocks
#pragma unroll
                for (int i = 0; i < GROUPS_OF_NB * 8; ++i) (&c[0][0][0])[i] = 0.0f;
                x.load(in, at, f, lane);
#pragma unroll
                for (int k = 0; k < R; ++k) {
                    u32 a[2][4];
                    operand.get(f * R + k, a);
#pragma unroll
                    for (int j = 0; j < GROUPS_OF_NB; ++j) {
                        mma(c[j][0], a[0], x.v[j][k][0], x.v[j][k][1]);
                        mma(c[j][1], a[1], x.v[j][k][2], x.v[j][k][3]);
                    }
                }
#pragma unroll
                for (int j = 0; j < GROUPS_OF_NB; ++j) {
                    const int slot = f * R + r;
                    const float undo = in.scales[(j * in.quads + at) * NB + b] * place_factor<F>(slot);
                    const float2 sum = in.sums[((j * in.quads + at) * 4 + slot) * NB + b];
#pragma unroll
                    for (int row = 0; row < 2; ++row)
#pragma unroll
                        for (int group = 0; group < F::GROUPS; ++group) {
                            const float *p = c[j][group] + row * 2, *q = c[j][1] + row * 2;
                            const float both = p[0] + p[1], all = F::GROUPS == 1 ? both + (q[0] + q[1]) : both;
                            const float s = F::GROUPS == 1 ? sum.x + sum.y : group ? sum.y : sum.x;
                            const float product = F::OFFSET ? fmaf(all, undo, -(float)F::OFFSET * s) : all * undo;
                            float& total = acc[j][f][row];
                            if (F::HAS_ADD) total = fmaf(F::add(scales[f], quad, row, group), s, total);
                            total = fmaf(F::mul(scales[f], quad, row, group), product, total);
                        }
                }
            }
        }
    }
};

template <class F>
struct Chunk<F, false> {
    DEVICE void add(const u8* chunk, int at, const Inputs& in, int lane, Columns& x, Sums& acc) {
        constexpr int PIECES = F::LOW / 16;
        const int b = (lane & 3) % NB;
        const uint4* pieces = (const uint4*)chunk + lane;
#pragma unroll
        for (int f = 0; f < NB; ++f) {
            float c[GROUPS_OF_NB][4];
#pragma unroll
            for (int i = 0; i < GROUPS_OF_NB * 4; ++i) (&c[0][0])[i] = 0.0f;
            x.load(in, at, f, lane);
#pragma unroll
            for (int k = 0; k < R; ++k)
#pragma unroll
                for (int n = 0; n < 2 * PIECES; ++n) {
                    const int w = n / PIECES;
                    const uint4 v = pieces[((f * R + k) * 2 * PIECES + n) * 32];
                    const u32 a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int j = 0; j < GROUPS_OF_NB; ++j) mma(c[j], a, x.v[j][k][w * 2], x.v[j][k][w * 2 + 1]);
                }
#pragma unroll
            for (int j = 0; j < GROUPS_OF_NB; ++j) {
                const float undo = in.scales[(j * in.quads + at) * NB + b];
#pragma unroll
                for (int row = 0; row < 2; ++row)
                    acc[j][f][row] = fmaf(c[j][row * 2] + c[j][row * 2 + 1], undo, acc[j][f][row]);
            }
        }
    }
};

template <class F>
DEVICE void add_chunk(const u8* chunk, int first_quad, const Inputs& in, int lane, Columns& x, Sums& acc) {
    Chunk<F, F::SCALED>::add(chunk, first_quad, in, lane, x, acc);
}

// ---- the matrices of a launch --------------------------------------------------------------------------------
struct Segment {
    const u8* data;
    const float* scale;
    int first_tile, rows, column, format, chunk_bytes, chunk_columns;
};

#define SEGMENT_PARAMETERS(n) const u8 *data##n, const float *scale##n, int tiles##n, int rows##n, int column##n,
#if SEGMENTS == 1
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0)
#define ALL_OF(name) {name##0}
#elif SEGMENTS == 2
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1)
#define ALL_OF(name) {name##0, name##1}
#elif SEGMENTS == 3
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1) SEGMENT_PARAMETERS(2)
#define ALL_OF(name) {name##0, name##1, name##2}
#else
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1) SEGMENT_PARAMETERS(2) SEGMENT_PARAMETERS(3)
#define ALL_OF(name) {name##0, name##1, name##2, name##3}
#endif

DEVICE float activate(float v, int activation) {
    switch (activation) {
        case 1: return v / (1.0f + expf(-v));
        case 2: return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
        case 3: return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
        case 4: return fmaxf(v, 0.0f);
        case 5: return fmaxf(v, 0.0f) * fmaxf(v, 0.0f);
        default: return v;
    }
}

// out = f(alpha * (norm(x) W^T + bias)) or out += ...; see matvec.py for shapes. grid <= tiles.
// resident: all of x stays in shared memory and tiles are the outer loop; else slabs are.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    matvec(ALL_SEGMENTS int tiles, int columns, int unit, int resident, int batch, const float* x, int x_stride,
           const float* norm, float eps, const float* bias, float* out, int out_stride, int activation, int add,
           int paired, float alpha) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / SPLIT, member = warp % SPLIT;
    pdl_launch();

    // shared memory: ring | partial sums [team][2][SPLIT][SEQUENCES][16] | barriers | halves | sums | scales |
    // sums of squares [SPLIT][4][SEQUENCES] | factors of the norm [team][SEQUENCES][16] | running sums of tiles
    const int slabs = (columns + SLAB - 1) / SLAB;
    const int all_quads = (columns + 127) / 128, quads = resident ? all_quads : SLAB / 128;
    u8* const ring = shared + warp * (DEPTH * SLOT);
    float* const partial = (float*)(shared + WARPS * DEPTH * SLOT) + team * (2 * SPLIT * SEQUENCES * 16);
    u64* const barriers = (u64*)(shared + WARPS * DEPTH * SLOT + WARPS * 2 * SEQUENCES * 64);
    u8* const input = (u8*)(barriers + WARPS * DEPTH);
    float* const squares = (float*)(input + quads * SEQUENCES * 548);
    float* const inverses = squares + SPLIT * 4 * SEQUENCES;
    float* const running = inverses + TEAMS * SEQUENCES * 16;
    Inputs in;
    in.quads = quads;
    in.halves = shared_address(input);
    in.sums = (const float2*)(input + quads * SEQUENCES * 512);
    in.scales = (const float*)(input + quads * SEQUENCES * 544);
    const u32 ring_at = shared_address(ring), barrier_at = shared_address(barriers + warp * DEPTH);
    const int stride = gridDim.x * TEAMS, first_tile = blockIdx.x + gridDim.x * team;

    auto segment_of = [&](int tile) {
        const u8* const data[SEGMENTS] = ALL_OF(data);
        const float* const scale[SEGMENTS] = ALL_OF(scale);
        const int ends[SEGMENTS] = ALL_OF(tiles), rows[SEGMENTS] = ALL_OF(rows), column[SEGMENTS] = ALL_OF(column);
        constexpr int format[SEGMENTS] = FORMAT_OF, bytes[SEGMENTS] = CHUNK_BYTES_OF, wide[SEGMENTS] = CHUNK_COLUMNS_OF;
        Segment s = {data[0], scale[0], 0, rows[0], column[0], format[0], bytes[0], wide[0]};
#pragma unroll
        for (int i = 1; i < SEGMENTS; ++i)
            if (tile >= ends[i - 1])
                s = {data[i], scale[i], ends[i - 1], rows[i], column[i], format[i], bytes[i], wide[i]};
        return s;
    };
    // This warp's columns of a slab, in units, and in chunks of a width.
    const int unit_bits = unit == 256 ? 8 : 7, units = (columns + unit - 1) >> unit_bits;
    const int slab_units = SLAB >> unit_bits, last_units = units - (slabs - 1) * slab_units;
    const int whole_begin = member * slab_units / SPLIT, whole_end = (member + 1) * slab_units / SPLIT;
    const int last_begin = member * last_units / SPLIT, last_end = (member + 1) * last_units / SPLIT;
    auto unit_range = [&](int slab, int& begin, int& end) {
        const bool last = slab == slabs - 1;
        begin = slab * slab_units + (last ? last_begin : whole_begin);
        end = slab * slab_units + (last ? last_end : whole_end);
    };
    auto chunk_shift = [&](int width) { return unit > width ? 1 : 0; };

    // The producer runs DEPTH chunks ahead of the consumer, over tiles and slabs in the same order.
    int next_tile = first_tile, next_slab = 0, left = 0, next_bytes = segment_of(0).chunk_bytes;
    const u8* next_source = nullptr;
    auto advance = [&]() {  // moves to the next tile or slab with work; false at the end
        while (true) {
            if (next_tile >= tiles) {
                if (resident || next_tile == first_tile || ++next_slab >= slabs) return false;
                next_tile = first_tile;
            }
            const Segment s = segment_of(next_tile);
            int begin, end;
            unit_range(next_slab, begin, end);
            const int shift = chunk_shift(s.chunk_columns);
            next_source = s.data + (i64)(((next_tile - s.first_tile) * units + begin) << shift) * s.chunk_bytes;
            if (SEGMENTS > 1) next_bytes = s.chunk_bytes;
            left = (end - begin) << shift;
            if (resident) {
                if (++next_slab == slabs) next_slab = 0, next_tile += stride;
            } else {
                next_tile += stride;
            }
            if (left > 0) return true;
        }
    };
    auto produce = [&](int slot) {
        if (left > 0 || advance()) {
            fetch(ring_at + slot * SLOT, barrier_at + slot * 8, next_source, next_bytes, lane);
            next_source += next_bytes;
            --left;
        }
        fetch_commit();
    };

    if (lane == 0)
        for (int i = 0; i < DEPTH; ++i) barrier_init(barrier_at + i * 8);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) produce(i);
    if (norm)
        for (int k = threadIdx.x * 32; k < columns; k += WARPS * 1024)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + k));
    if (team == 0)
        for (int i = lane; i < 4 * SEQUENCES; i += 32) squares[member * 4 * SEQUENCES + i] = 0.0f;
    if (TEAMS > 1)
        named_barrier(1 + member, TEAMS * 32);
    else
        __syncwarp();
    pdl_wait();

    // Splits this member's columns of a slab into halfs, shared out among the teams.
    const bool wide_loads = ((columns | x_stride) & 3) == 0 && ((u64)x & 15) == 0 && ((u64)norm & 15) == 0;
    auto convert = [&](int slab) {
        int begin, end;
        unit_range(slab, begin, end);
        begin <<= unit_bits - 7;
        end = min(end << (unit_bits - 7), all_quads);
        const int base = resident ? 0 : slab * (SLAB / 128), s = lane >> 3, half = (lane >> 2) & 1, t = lane & 3;
        for (int b = 0; b < batch; ++b) {
            const float* row = x + (i64)b * x_stride;
            const int j = b / NB, bn = b % NB;
            // One sum of squares per residue of the quad mod 4, so that their order does not depend on TEAMS.
            constexpr int AHEAD = TEAMS == 1 ? 4 : 2, CLASSES = 4 / TEAMS;
            float square[CLASSES] = {};
            for (int first = begin + team; first < end; first += TEAMS * AHEAD) {
                float v[AHEAD][4], weight[AHEAD][4];
#pragma unroll
                for (int n = 0; n < AHEAD; ++n) {
                    const int quad = first + n * TEAMS, k = quad * 128 + lane * 4;
                    const bool live = quad < end;
                    if (live && wide_loads && k < columns) {
                        const float4 a = __ldcg((const float4*)(row + k));
                        v[n][0] = a.x, v[n][1] = a.y, v[n][2] = a.z, v[n][3] = a.w;
                        const float4 m = norm ? __ldg((const float4*)(norm + k)) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
                        weight[n][0] = m.x, weight[n][1] = m.y, weight[n][2] = m.z, weight[n][3] = m.w;
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const bool inside = live && k + i < columns;
                            v[n][i] = inside ? __ldcg(row + k + i) : 0.0f;
                            weight[n][i] = inside && norm ? norm[k + i] : 1.0f;
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < AHEAD; ++n) {
                    const int quad = first + n * TEAMS;
                    if (quad >= end) continue;
                    float y[4], largest = 0.0f, sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        square[n % CLASSES] = fmaf(v[n][i], v[n][i], square[n % CLASSES]);
                        y[i] = v[n][i] * weight[n][i];
                        largest = fmaxf(largest, fabsf(y[i]));
                        sum += y[i];
                    }
#if __CUDA_ARCH__ >= 800
                    u32 bits;
                    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(bits) : "r"(__float_as_uint(largest)));
#else
                    const u32 bits = __float_as_uint(warp_max(largest));
#endif
                    // 2^e with 2^e * largest in [2^14, 2^15)
                    const u32 exponent = min(max(bits >> 23, 20u), 240u);
                    const float up = __uint_as_float((268u - exponent) << 23);
                    u32 high[2], low[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float p = y[2 * i] * up, q = y[2 * i + 1] * up;
                        high[i] = pack_halves(p, q);
                        low[i] = pack_halves(p - low_half(high[i]), q - high_half(high[i]));
                    }
                    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
                    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
                    const int local = quad - base, f = s / R, column = (s % R) * 2 * NB + 2 * bn;
                    uint2* const at = (uint2*)((uint4*)input + (((j * quads + local) * NB + f) * 32 + column * 4 + t)) + half;
                    at[0] = make_uint2(high[0], high[1]);
                    at[8] = make_uint2(low[0], low[1]);
                    if (t == 0) ((float*)in.sums)[(((j * quads + local) * 4 + s) * NB + bn) * 2 + half] = sum;
                    if (lane == 0) ((float*)in.scales)[(j * quads + local) * NB + bn] = __uint_as_float((exponent - 14u) << 23);
                }
            }
            if (norm)
#pragma unroll
                for (int n = 0; n < CLASSES; ++n) {
                    const float sum = warp_sum(square[n]);
                    if (lane == 0) squares[(member * 4 + team + n * TEAMS) * SEQUENCES + b] += sum;
                }
        }
        if (TEAMS > 1)
            named_barrier(1 + member, TEAMS * 32);
        else
            __syncwarp();
    };

    int slot = 0, tile = first_tile, slab = 0, turn = 0, ordinal = 0;
    u32 parity = 0;
    bool fresh = true;
    constexpr int OUTPUTS = SEQUENCES * 16, TEAM_THREADS = SPLIT * 32, PER_THREAD = (OUTPUTS + TEAM_THREADS - 1) / TEAM_THREADS;
    const int rank = member * 32 + lane;
    float before[PER_THREAD];
    Columns columns_of_x;
    columns_of_x.clear();
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) before[i] = 0.0f;

    while (true) {
        if (fresh) {
            if (!resident) __syncthreads();
            convert(slab);
        }
        if (tile < tiles) {
            const Segment s = segment_of(tile);
            const int local = tile - s.first_tile;
            // What this thread will store: (sequence, row of the tile), one or more of them.
            if (rank < OUTPUTS && (resident ? slab == 0 : slab == slabs - 1))
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i) {
                    const int index = rank + i * TEAM_THREADS, b = index >> 4, row = local * 16 + (index & 15);
                    if (add && b < batch && row < s.rows) before[i] = __ldcg(out + (i64)b * out_stride + s.column + row);
                }
            int begin, end;
            unit_range(slab, begin, end);
            const int per_chunk = s.chunk_columns / 128;
            int quad = (begin << (unit_bits - 7)) - (resident ? 0 : slab * (SLAB / 128));
            end = (end - begin) << chunk_shift(s.chunk_columns);
            Sums acc;
#pragma unroll
            for (int i = 0; i < SEQUENCES * 2; ++i) (&acc[0][0][0])[i] = 0.0f;
            for (int chunk = 0; chunk < end; ++chunk, quad += per_chunk) {
                fetch_wait(barrier_at + slot * 8, parity);
                const u8* const at = ring + slot * SLOT;
#if FORMATS == 1
                add_chunk<FORMAT0>(at, quad, in, lane, columns_of_x, acc);
#elif FORMATS == 2
                if (s.format == 0) add_chunk<FORMAT0>(at, quad, in, lane, columns_of_x, acc);
                else add_chunk<FORMAT1>(at, quad, in, lane, columns_of_x, acc);
#elif FORMATS == 3
                if (s.format == 0) add_chunk<FORMAT0>(at, quad, in, lane, columns_of_x, acc);
                else if (s.format == 1) add_chunk<FORMAT1>(at, quad, in, lane, columns_of_x, acc);
                else add_chunk<FORMAT2>(at, quad, in, lane, columns_of_x, acc);
#else
                if (s.format == 0) add_chunk<FORMAT0>(at, quad, in, lane, columns_of_x, acc);
                else if (s.format == 1) add_chunk<FORMAT1>(at, quad, in, lane, columns_of_x, acc);
                else if (s.format == 2) add_chunk<FORMAT2>(at, quad, in, lane, columns_of_x, acc);
                else add_chunk<FORMAT3>(at, quad, in, lane, columns_of_x, acc);
#endif
                __syncwarp();
                produce(slot);
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }

            // Lanes, then warps, in a fixed order.
            float* const mine = partial + turn * (SPLIT * OUTPUTS);
            turn ^= 1;
#pragma unroll
            for (int j = 0; j < GROUPS_OF_NB; ++j)
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float v;
                    if (NB == 4) {
                        v = (acc[j][0][row] + acc[j][NB > 1 ? 1 : 0][row]) +
                            (acc[j][NB > 2 ? 2 : 0][row] + acc[j][NB > 3 ? 3 : 0][row]);
                    } else if (NB == 2) {
                        const float first = acc[j][0][row], second = acc[j][NB > 1 ? 1 : 0][row];
                        v = (first + __shfl_xor_sync(FULL_MASK, first, 2)) +
                            (second + __shfl_xor_sync(FULL_MASK, second, 2));
                    } else {
                        v = acc[j][0][row];
                        v += __shfl_xor_sync(FULL_MASK, v, 1);
                        v += __shfl_xor_sync(FULL_MASK, v, 2);
                    }
                    if ((lane & 3) < NB)
                        mine[member * OUTPUTS + (j * NB + (lane & 3)) * 16 + row * 8 + (lane >> 2)] = v;
                }
            named_barrier(TEAMS > 1 ? 1 + SPLIT + team : 1, TEAM_THREADS);
            if (member * 32 < OUTPUTS) {
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i) {
                    const int index = rank + i * TEAM_THREADS, b = index >> 4, in_tile = index & 15;
                    const bool live = index < OUTPUTS;
                    float sum = 0.0f;
                    if (live)
#pragma unroll
                        for (int w = 0; w < SPLIT; ++w) sum += mine[w * OUTPUTS + index];
                    if (slabs > 1 && live) {
                        float* const kept = running + ((ordinal * TEAMS + team) * OUTPUTS + index);
                        if (slab) sum += *kept;
                        *kept = sum;
                    }
                    if (slab == slabs - 1) {
                        float value = sum;
                        if (s.scale) value *= s.scale[0];
                        if (norm) {
                            // Each thread keeps its own sequence's factor, found at its first tile.
                            float* const kept = inverses + team * OUTPUTS + (live ? index : 0);
                            float inverse;
                            if (tile == first_tile) {
                                float square = 0.0f;
#pragma unroll 8
                                for (int w = 0; w < SPLIT * 4; ++w) square += squares[w * SEQUENCES + (live ? b : 0)];
                                inverse = rsqrtf(fmaf(square, 1.0f / (float)columns, eps));
                                if (live) *kept = inverse;
                            } else {
                                inverse = *kept;
                            }
                            value *= inverse;
                        }
                        if (paired) {
                            const float up = __shfl_xor_sync(FULL_MASK, value, 8) * alpha;
                            const int row = local * 8 + in_tile;
                            if (live && in_tile < 8 && b < batch && row < s.rows)
                                out[(i64)b * out_stride + row] = activate(value * alpha, activation) * up;
                        } else {
                            const int row = local * 16 + in_tile;
                            if (live && b < batch && row < s.rows) {
                                if (bias) value += bias[s.column + row];
                                value = activate(value * alpha, activation);
                                out[(i64)b * out_stride + s.column + row] = add ? before[i] + value : value;
                            }
                        }
                    }
                }
            }
        }
        if (resident) {
            if (++slab == slabs) {
                slab = 0;
                tile += stride;
                fresh = false;
                if (tile >= tiles) break;
            }
        } else {
            tile += stride;
            ++ordinal;
            fresh = false;
            if (tile >= tiles) {
                tile = first_tile;
                ordinal = 0;
                fresh = true;
                if (++slab == slabs) break;
            }
        }
    }
}
