// The multiplication of matvec.cu: fetching chunks, operands, and one chunk times the inputs in shared memory.
//
// Quantized formats: mma.sync m16n8k32 on bytes, exact in integers: 16 weight rows x 8 columns of activations, where a
// sequence takes two columns: x of every 32 columns as a 16-bit fixed-point number (largest = 32600), high and low byte.
// Relative error of x: 2^-16 of the largest of 32, far below a half's. The quants need one AND per four weights.
// Unquantized formats (HALVES): m16n8k16 on halfs, x = high + low halfs times a power of two per 32 columns.
// With fewer than 4 sequences the free columns take other sub-blocks (R = 4/NB of them), so that every lane ends up with
// the sums of different sub-blocks and applies its scales to them once, in float32.

constexpr bool HALVES = !FORMAT0::SCALED;
constexpr int R = 4 / NB, SEQUENCES = NB * GROUPS_OF_NB, TEAMS = WARPS / SPLIT;
constexpr int PIECE = HALVES ? 16 : 8;                        // bytes of x of one lane for one mma
// Four sequences: every lane needs the scales of all sub-blocks, so each finds those of one and leaves them for the others.
constexpr bool FEW = NB == 4 && !HALVES;
constexpr int QUAD_BYTES = 32 * PIECE + 16 + (HALVES ? 0 : FEW ? 48 : 32);  // of one sequence in shared memory
constexpr int LEFT_SCALES = FEW ? 1024 : 0;                                 // of a warp
static_assert(RESIDENT || !ONE_SLAB, "one slab always fits");

// ---- tensor cores --------------------------------------------------------------------------------------------
// 16 columns of bytes; the weights are unsigned, or signed.
template <bool SIGNED>
DEVICE void mma_bytes(int (&c)[4], const u32* a, u32 b) {
#if __CUDA_ARCH__ >= 800
    if (SIGNED)
        asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
#else
#pragma unroll
    for (int row = 0; row < 2; ++row)
        if (SIGNED)
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(c[row * 2]), "+r"(c[row * 2 + 1])
                : "r"(a[row]), "r"(b));
        else
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(c[row * 2]), "+r"(c[row * 2 + 1])
                : "r"(a[row]), "r"(b));
#endif
}

// 32 columns of bytes.
template <bool SIGNED>
DEVICE void mma_bytes(int (&c)[4], const u32* a, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    if (SIGNED)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_bytes<SIGNED>(c, a, b0);
    mma_bytes<SIGNED>(c, a + 2, b1);
#endif
}

// ---- the stream of chunks ------------------------------------------------------------------------------------
DEVICE void open_slot(u32 barrier) {
#if __CUDA_ARCH__ >= 900
    barrier_init(barrier, 1);
#endif
}

DEVICE void publish_slots() {
#if __CUDA_ARCH__ >= 900
    publish_barriers();
#endif
}

DEVICE void fetch(u32 slot, u32 barrier, const u8* source, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        barrier_expect(barrier, bytes);
        bulk_copy<true>(slot, source, bytes, barrier);
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
    barrier_wait(barrier, parity);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
#else
    __syncwarp();
#endif
}

// ---- weights of one sub-block as mma operands ----------------------------------------------------------------
// Quants are used in their place in the byte if they fit there; this undoes the power of two.
template <class F>
DEVICE int place(int s) {
    if (F::CODED) return 0;
    if (F::LOW == 4) return F::HIGH ? 0 : (s & 1) * 4;
    if (F::LOW == 2) return F::HIGH && s == 3 ? 4 : s * 2;
    return 0;
}
template <class F>
DEVICE float place_factor(int slot) {
    return __uint_as_float((u32)(127 - place<F>(slot)) << 23);
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
    __device__ __forceinline__ void get(int s, u32 (&a)[4]) const {
        const uint4 v = low[LOW == 4 ? s >> 1 : 0];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        const int at = place<F>(s), from = LOW == 4 ? (s & 1) * 4 : s * 2;
        const u32 mask = (LOW == 4 ? 0x0f0f0f0fu : 0x03030303u) << at;
        const u32 high_mask = (F::HIGH == 2 ? 0x03030303u : 0x01010101u) << (at + LOW);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int row = n & 1, w = n >> 1;
            if constexpr (F::CODED) {
                a[n] = F::levels(words[row * 2 + w], s & 1);
                continue;
            }
            u32 q = (words[row * 2 + w] >> (from - at)) & mask;
            if (F::HIGH) {
                const u32 h = high[F::HIGH == 2 ? (s >> 1) * 2 + row : LOW == 4 ? s >> 1 : row];
                const int shift = high_in_byte<LOW, F::HIGH>(s, w, row) - (at + LOW);
                q |= (shift > 0 ? h >> shift : h << -shift) & high_mask;
            }
            a[n] = q;
        }
    }
};

template <class F>
struct Operand<F, 8> {
    const uint4* at;
    __device__ __forceinline__ void load(const u8* chunk, int quad, int lane) {
        at = (const uint4*)(chunk + quad * F::QUAD_LOW) + lane;
    }
    __device__ __forceinline__ void get(int s, u32 (&a)[4]) const {
        const uint4 v = at[s * 32];
        a[0] = v.x, a[1] = v.z, a[2] = v.y, a[3] = v.w;
    }
};

template <class F>
struct Operand<F, 0> {  // coded, without bits of their own
    const u8* chunk;
    int quad, lane;
    __device__ __forceinline__ void load(const u8* chunk_, int quad_, int lane_) { chunk = chunk_, quad = quad_, lane = lane_; }
    __device__ __forceinline__ void get(int s, u32 (&a)[4]) const {
#pragma unroll
        for (int n = 0; n < 4; ++n) a[n] = F::numbers(chunk, quad, s, n >> 1, lane, n & 1);
    }
};

// ---- grids -----------------------------------------------------------------------------------------------------
// Brings the grids of the kernel's formats into shared memory. For all threads of the block.
DEVICE void bring_grids() {
    bool any = GridOf<FORMAT0>::ANY;
    GridOf<FORMAT0>::bring(threadIdx.x, blockDim.x);
#if FORMATS > 1
    any |= GridOf<FORMAT1>::ANY;
    GridOf<FORMAT1>::bring(threadIdx.x, blockDim.x);
#endif
#if FORMATS > 2
    any |= GridOf<FORMAT2>::ANY;
    GridOf<FORMAT2>::bring(threadIdx.x, blockDim.x);
#endif
#if FORMATS > 3
    any |= GridOf<FORMAT3>::ANY;
    GridOf<FORMAT3>::bring(threadIdx.x, blockDim.x);
#endif
    if (any) __syncthreads();
}

// ---- one chunk -----------------------------------------------------------------------------------------------
struct Inputs {
    u32 pieces;           // shared address: [group][quad][NB][lane] PIECE bytes
    const float2* sums;   // [group][sub-block][NB]: sums of its two 16s
    const float* scales;  // [group][sub-block][NB]: what undoes the scaling
    int quads;             // resident
    // Four sequences: the pieces of two sub-blocks beside each other, [group][quad][2][lane][2]; all floats together,
    // [group][sub-block][NB] undo, sum of both 16s, the two; and this warp's scales.
    const u8* bytes;
    const float4* floats;
    float4* scales_left;
};

typedef float Sums[GROUPS_OF_NB][NB][2];  // [group][slot / R][row]

// B operands of R sub-blocks. A lane's column belongs to one of them (its turn); its registers of the others are zero
// from the start and never written, which costs no instruction.
struct Columns {
    u32 v[GROUPS_OF_NB][R][PIECE / 4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < GROUPS_OF_NB * R * PIECE / 4; ++i) (&v[0][0][0])[i] = 0u;
    }
    __device__ __forceinline__ void load(const Inputs& in, int quad, int f, int lane) {
        const u32 turn = (lane >> 2) / (2 * NB);
#pragma unroll
        for (int j = 0; j < GROUPS_OF_NB; ++j) {
            const u32 at = in.pieces + (((j * in.quads + quad) * NB + f) * 32 + lane) * PIECE;
#pragma unroll
            for (int k = 0; k < R; ++k) {
                u32* const x = v[j][k];
                if (HALVES)
                    asm volatile(
                        "{\n.reg .pred mine;\nsetp.eq.u32 mine, %5, %6;\n@mine ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                        : "+r"(x[0]), "+r"(x[1]), "+r"(x[HALVES ? 2 : 0]), "+r"(x[HALVES ? 3 : 1])
                        : "r"(at), "r"(R == 1 ? 0u : turn), "r"(k));
                else
                    asm volatile(
                        "{\n.reg .pred mine;\nsetp.eq.u32 mine, %3, %4;\n@mine ld.shared.v2.u32 {%0,%1}, [%2];\n}"
                        : "+r"(x[0]), "+r"(x[1])
                        : "r"(at), "r"(R == 1 ? 0u : turn), "r"(k));
            }
        }
    }
};
template <class F, bool SCALED, bool FOUR>
struct Chunk {
    DEVICE void add(const u8* chunk, int first_quad, const Inputs& in, int lane, Columns& x, Sums& acc) {
        constexpr bool SIGNED = F::LOW == 8 || F::CODED;
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
                // Sums start at the bits of 1.5 * 2^23, so that they are floats without a conversion.
                int c[GROUPS_OF_NB][F::GROUPS][4];
#pragma unroll
                for (int i = 0; i < GROUPS_OF_NB * F::GROUPS * 4; ++i) (&c[0][0][0])[i] = 0x4b400000;
                x.load(in, at, f, lane);
#pragma unroll
                for (int k = 0; k < R; ++k) {
                    u32 a[4];
                    operand.get(f * R + k, a);
#pragma unroll
                    for (int j = 0; j < GROUPS_OF_NB; ++j) {
                        if (F::GROUPS == 1) {
                            mma_bytes<SIGNED>(c[j][0], a, x.v[j][k][0], x.v[j][k][1]);
                        } else {
                            mma_bytes<SIGNED>(c[j][0], a, x.v[j][k][0]);
                            mma_bytes<SIGNED>(c[j][F::GROUPS - 1], a + 2, x.v[j][k][1]);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < GROUPS_OF_NB; ++j) {
                    const int slot = f * R + r, index = ((j * in.quads + at) * 4 + slot) * NB + b;
                    const float undo = in.scales[index] * place_factor<F>(slot);
                    float2 sum = make_float2(0.0f, 0.0f);
                    if (F::HAS_ADD || F::OFFSET) sum = in.sums[index];
#pragma unroll
                    for (int row = 0; row < 2; ++row)
#pragma unroll
                        for (int group = 0; group < F::GROUPS; ++group) {
                            const int* p = c[j][group] + row * 2;
                            const float all = fmaf(__int_as_float(p[0]) - 12582912.0f, 256.0f,
                                                   __int_as_float(p[1]) - 12582912.0f);
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

// Four sequences and more: the same operations in the same order, fewer instructions.
template <class F>
struct Chunk<F, true, true> {
    // Of both quads of a chunk, in the order in which lanes meet no bank twice.
    static constexpr bool LEAVES = F::BLOCK == 256 && !(F::GROUPS == 2 && F::HAS_ADD);
    DEVICE int left_at(int quad, int slot, int g) { return (quad * 4 + slot) * 8 + (g ^ (2 * slot)); }

    DEVICE void add(const u8* chunk, int first_quad, const Inputs& in, int lane, Columns&, Sums& acc) {
        constexpr bool SIGNED = F::LOW == 8 || F::CODED;
        const int g = lane >> 2, t = lane & 3;
        Scales scales[4];
        if constexpr (LEAVES) {
            const Scales own = F::load(chunk, g, t);
            const float back = F::OFFSET ? 1.0f : place_factor<F>(t);
#pragma unroll
            for (int quad = 0; quad < F::QUADS; ++quad) {
                float4 v;
                if (F::GROUPS == 2)
                    v = make_float4(F::mul(own, quad, 0, 0) * back, F::mul(own, quad, 0, 1) * back,
                                    F::mul(own, quad, 1, 0) * back, F::mul(own, quad, 1, 1) * back);
                else
                    v = make_float4(F::mul(own, quad, 0, 0) * back, F::mul(own, quad, 1, 0) * back,
                                    F::add(own, quad, 0, 0), F::add(own, quad, 1, 0));
                in.scales_left[left_at(quad, t, g)] = v;
            }
            __syncwarp();
        } else {
#pragma unroll
            for (int f = 0; f < 4; ++f) scales[f] = F::load(chunk, g, f);
        }
#pragma unroll
        for (int quad = 0; quad < F::QUADS; ++quad) {
            Operand<F, F::LOW> operand;
            operand.load(chunk, quad, lane);
            const int at = first_quad + quad;
#pragma unroll
            for (int two = 0; two < 2; ++two) {
                uint4 pieces[GROUPS_OF_NB];
#pragma unroll
                for (int j = 0; j < GROUPS_OF_NB; ++j)
                    pieces[j] = *(const uint4*)(in.bytes + (((j * in.quads + at) * 2 + two) * 32 + lane) * 16);
#pragma unroll
                for (int f = two * 2; f < two * 2 + 2; ++f) {
                    u32 a[4];
                    operand.get(f, a);
                    float4 left = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (LEAVES) left = in.scales_left[left_at(quad, f, g)];
#pragma unroll
                    for (int j = 0; j < GROUPS_OF_NB; ++j) {
                        int c[F::GROUPS][4] = {};
                        const u32 first = f & 1 ? pieces[j].z : pieces[j].x, second = f & 1 ? pieces[j].w : pieces[j].y;
                        if (F::GROUPS == 1) {
                            mma_bytes<SIGNED>(c[0], a, first, second);
                        } else {
                            mma_bytes<SIGNED>(c[0], a, first);
                            mma_bytes<SIGNED>(c[F::GROUPS - 1], a + 2, second);
                        }
                        const float4* const floats = in.floats + ((j * in.quads + at) * 4 + f) * 4 + t;
                        float4 of_x;
                        if (F::GROUPS == 2 && (F::HAS_ADD || F::OFFSET)) {
                            of_x = *floats;
                        } else if (F::HAS_ADD || F::OFFSET) {
                            const float2 v = *(const float2*)floats;
                            of_x = make_float4(v.x, v.y, 0.0f, 0.0f);
                        } else {
                            of_x = make_float4(*(const float*)floats, 0.0f, 0.0f, 0.0f);
                        }
                        // A power of two: it makes no difference whether it is part of this factor or of the scale.
                        const float undo = LEAVES && !F::OFFSET ? of_x.x : of_x.x * place_factor<F>(f);
#pragma unroll
                        for (int row = 0; row < 2; ++row)
#pragma unroll
                            for (int group = 0; group < F::GROUPS; ++group) {
                                const int* p = c[group] + row * 2;
                                const float all = __int2float_rn(p[0] * 256 + p[1]);  // below 2^31
                                const float s = F::GROUPS == 1 ? of_x.y : group ? of_x.w : of_x.z;
                                const float product = F::OFFSET ? fmaf(all, undo, -(float)F::OFFSET * s) : all * undo;
                                float& total = acc[j][f][row];
                                const float mul = !LEAVES ? F::mul(scales[f], quad, row, group)
                                                  : F::GROUPS == 2 ? (row ? (group ? left.w : left.z) : (group ? left.y : left.x))
                                                                   : (row ? left.y : left.x);
                                if (F::HAS_ADD) {
                                    const float add = LEAVES ? (row ? left.w : left.z) : F::add(scales[f], quad, row, group);
                                    total = fmaf(add, s, total);
                                }
                                total = fmaf(mul, product, total);
                            }
                    }
                }
            }
        }
    }
};

template <class F, bool FOUR>
struct Chunk<F, false, FOUR> {
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
                    for (int j = 0; j < GROUPS_OF_NB; ++j) 
                        mma16(c[j], a[0], a[1], a[2], a[3], x.v[j][k][w * 2], x.v[j][k][w * 2 + 1]);
                }
#pragma unroll
            for (int j = 0; j < GROUPS_OF_NB; ++j) {
                const float undo = in.scales[((j * in.quads + at) * 4 + f * R + (lane & 3) / NB) * NB + b];
#pragma unroll
                for (int row = 0; row < 2; ++row)
                    acc[j][f][row] = fmaf(c[j][row * 2] + c[j][row * 2 + 1], undo, acc[j][f][row]);
            }
        }
    }
};

template <class F>
DEVICE void add_chunk(const u8* chunk, int first_quad, const Inputs& in, int lane, Columns& x, Sums& acc) {
    Chunk<F, F::SCALED, FEW>::add(chunk, first_quad, in, lane, x, acc);
}
