// Packed weights (formats.cuh) as half operands of wgmma, in registers: 64 columns of a 16-row tile at a time.
//
// A lane (g, t) of a warp owns columns 4t .. 4t+3 of each group of 16 and rows g and g + 8; as the operand A of
// wgmma it gives two halfs of "columns" 2t, 2t+1 and two of 2t+8, 2t+9 per row. Sums do not care for the order of
// columns, so the even ones (4t, 4t+2) take the first place and the odd ones the second: they are 16 bits apart in the
// packed words and need no shuffle. x is kept in the same order (place_of_column).
// A quant becomes a half by its bits under the exponent of 1024 (0x6400 | q = 1024 + q): one logic operation, one exact
// subtraction, then times the scale, plus the minimum. Scales are halfs too: rounding them is an error of 2^-12 relative,
// as that of every weight. Formats with scales of scales
// - are kept times GAIN, which the end of the product takes back, so that small scales stay above the halfs' denormals
//   (weights up to 65504 / GAIN fit), and
// - have quants counted from CENTER, the middle of their range, if they have minimums: what is then added is small, while
//   minimums themselves are larger than most weights, and so would their rounding be.
// Needs half_pairs.cuh, which says why there is a second way.

// Place of column c (0..15) of a group in the operands.
DEVICE int place_of_column(int c) { return 2 * (c >> 2) + ((c & 3) >> 1) + 8 * (c & 1); }

// Small numbers as halfs at compile time.
constexpr u32 half_bits(int v) {
    u32 sign = v < 0 ? 0x8000u : 0u, m = v < 0 ? -v : v, e = 25;
    if (m == 0) return 0;
    while (m < 1024u) m <<= 1, --e;
    return sign | (e << 10) | (m & 1023u);
}
constexpr u32 power_of_half(int exponent) { return (u32)(15 + exponent) << 10; }

// ---- scales ------------------------------------------------------------------------------------------------------
// Of every format: Chunk is what is made once per chunk. Of (quad, s): load() reads, make() computes, then mul(row, w) and
// add(row, w) give the factor and the summand, twice in a register. UNDO: what the sums are to be multiplied by.
struct NoChunk {
    __device__ __forceinline__ void load(const u8*, int, u32) {}
};

template <class F>
struct HalfScales {  // in general through float32
    typedef NoChunk Chunk;
    static constexpr float UNDO = 1.0f / GAIN;
    static constexpr int CENTER = F::HAS_ADD ? 1 << (F::LOW + F::HIGH - 1) : 0;
    Scales scales;
    __device__ __forceinline__ void load(const u8* chunk, int, int s, int lane) { scales = F::load(chunk, lane >> 2, s); }
    int quad;
    __device__ __forceinline__ void make(const Chunk&, int quad_, int, int) { quad = quad_; }
    __device__ __forceinline__ u32 mul(int row, int w) const {
        return twice((u32)float_to_half(F::mul(scales, quad, row, w) * GAIN), 0);
    }
    __device__ __forceinline__ u32 add(int row, int w) const {
        return twice((u32)float_to_half(fmaf(F::mul(scales, quad, row, w), CENTER, F::add(scales, quad, row, w)) * GAIN), 0);
    }
};

template <class P>
struct PlainHalfScales {  // halfs already
    typedef NoChunk Chunk;
    static constexpr float UNDO = 1.0f;
    static constexpr int CENTER = 0;
    Scales scales;
    __device__ __forceinline__ void load(const u8* chunk, int, int s, int lane) { scales = P::load(chunk, lane >> 2, s); }
    __device__ __forceinline__ void make(const Chunk&, int, int, int) {}
    __device__ __forceinline__ u32 mul(int row, int) const { return twice(scales.a, row); }
    __device__ __forceinline__ u32 add(int row, int) const { return twice(scales.b, row); }
};
template <> struct HalfScales<Q4_0> : PlainHalfScales<Q4_0> {};
template <> struct HalfScales<Q4_1> : PlainHalfScales<Q4_1> {};
template <> struct HalfScales<Q5_0> : PlainHalfScales<Q5_0> {};
template <> struct HalfScales<Q5_1> : PlainHalfScales<Q5_1> {};
template <> struct HalfScales<Q8_0> : PlainHalfScales<Q8_0> {};

template <class K, int MIDDLE>
struct K45HalfScales {
    static constexpr float UNDO = 1.0f / GAIN;
    static constexpr int CENTER = MIDDLE;
    u32 pair[2];
    // The four lanes of a g need the same 16 pairs of a chunk: lane t makes those of slot t, and they exchange them.
    struct Chunk {
        u32 own[2][2];
        __device__ __forceinline__ void load(const u8* chunk, int lane, u32) {
            const Scales raw = K::load(chunk, lane >> 2, lane & 3);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float d = low_half(row ? raw.d : raw.c) * GAIN, m = high_half(row ? raw.d : raw.c) * GAIN;
#pragma unroll
                for (int quad = 0; quad < 2; ++quad) {
                    const int at = 12 * (quad * 2 + row);
                    const u32 bits = at == 24 ? __funnelshift_r(raw.a, raw.b, 24) : at == 36 ? raw.b >> 4 : raw.a >> at;
                    const float factor = d * small_to_float(bits & 63u);
                    const float rest = fmaf(factor, (float)CENTER, -m * small_to_float((bits >> 6) & 63u));
                    own[quad][row] = two_halves(factor, rest);
                }
            }
        }
    };
    __device__ __forceinline__ void load(const u8*, int, int, int) {}
    __device__ __forceinline__ void make(const Chunk& chunk, int quad, int s, int lane) {
#pragma unroll
        for (int row = 0; row < 2; ++row) pair[row] = __shfl_sync(FULL_MASK, chunk.own[quad][row], (lane & 28) | s);
    }
    __device__ __forceinline__ u32 mul(int row, int) const { return twice(pair[row], 0); }
    __device__ __forceinline__ u32 add(int row, int) const { return twice(pair[row], 1); }
};
template <> struct HalfScales<Q4_K> : K45HalfScales<Q4_K, 8> {};
template <> struct HalfScales<Q5_K> : K45HalfScales<Q5_K, 16> {};

template <>
struct HalfScales<Q6_K> {
    typedef NoChunk Chunk;
    static constexpr float UNDO = 1.0f / GAIN;
    static constexpr int CENTER = 0;
    u32 bytes, super, pair[2];
    __device__ __forceinline__ void load(const u8* chunk, int quad, int s, int lane) {
        const Scales raw = Q6_K::load(chunk, lane >> 2, s);
        bytes = quad ? raw.b : raw.a, super = raw.c;
    }
    __device__ __forceinline__ void make(const Chunk&, int, int, int) {
        const u32 factor = mul_halves(super, same_halves(half_bits(GAIN)));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const u32 biased = __byte_perm(bytes, 0x64646464u, row ? 0x4342 : 0x4140);
            pair[row] = mul_halves(add_halves(biased, same_halves(half_bits(-1152))), twice(factor, row));
        }
    }
    __device__ __forceinline__ u32 mul(int row, int w) const { return twice(pair[row], w); }
    __device__ __forceinline__ u32 add(int, int) const { return 0u; }
};

struct NoHalfScales {
    typedef NoChunk Chunk;
    static constexpr float UNDO = 1.0f;
};
template <> struct HalfScales<F16> : NoHalfScales {};
template <> struct HalfScales<BF16> : NoHalfScales {};

template <class F>
using ChunkScales = typename HalfScales<F>::Chunk;

// ---- 64 columns ----------------------------------------------------------------------------------------------------
typedef u32 Operands[4][4];  // [group of 16][register]: row 0 and 1 of the even columns, then of the odd ones

// The even (or odd) of four signed bytes as halfs.
DEVICE u32 halves_of_bytes(u32 word, int odd) {
    const u32 biased = ((odd ? word >> 8 : word) & 0x00ff00ffu) ^ 0x64806480u;  // 1024 + 128 + q
    return add_halves(biased, same_halves(half_bits(-1152)));
}

// What a lane reads of 64 columns (load) and makes of it (make); step: which 64 columns of the chunk.
template <class F, int LOW>
struct HalfOperands {  // 4 or 2 low bits with 0, 1 or 2 high ones, levels, or signed bytes
    uint4 low[LOW == 8 ? 2 : 1];
    u32 high[2];
    HalfScales<F> scales[2];
    __device__ __forceinline__ void load(const u8* chunk, int step, int lane) {
        const int quad = step >> 1, p = step & 1;
        const uint4* const at = (const uint4*)(chunk + quad * F::QUAD_LOW) + lane;
        if (LOW == 8) {
            low[0] = at[p * 64];
            low[LOW == 8 ? 1 : 0] = at[p * 64 + 32];
        } else {
            low[0] = at[LOW == 4 ? p * 32 : 0];
        }
        const u8* const plane = chunk + F::HIGH_AT + quad * F::QUAD_HIGH;
        high[0] = high[1] = 0u;
        if (F::HIGH == 2) {
            const uint2 v = *(const uint2*)(plane + lane * 16 + p * 8);
            high[0] = v.x, high[1] = v.y;
        } else if (F::HIGH == 1 && LOW == 4) {
            high[0] = high[1] = *(const u32*)(plane + lane * 8 + p * 4);
        } else if (F::HIGH == 1) {
            const uint2 v = *(const uint2*)(plane + lane * 8);
            high[0] = v.x, high[1] = v.y;
        }
        scales[0].load(chunk, quad, p * 2, lane);
        scales[1].load(chunk, quad, p * 2 + 1, lane);
    }
    // magic: hidden_constant(0x64006400).
    __device__ __forceinline__ void make(const ChunkScales<F>& made, int step, int lane, u32 magic, Operands& out) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int s = (step & 1) * 2 + half, place = LOW == 4 ? half * 4 : LOW == 2 ? s * 2 : 0;
            HalfScales<F>& factors = scales[half];
            factors.make(made, step >> 1, s, lane);
            const uint4 v = low[LOW == 8 ? half : 0];
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int w = 0; w < 2; ++w)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd)
#pragma unroll
                    for (int row = 0; row < 2; ++row) {
                        const u32 word = words[row * 2 + w];
                        u32 q;
                        if constexpr (F::CODED) {
                            q = halves_of_bytes(F::levels(word, half), odd);
                        } else if (LOW == 8) {
                            q = halves_of_bytes(word, odd);
                        } else {
                            q = and_or(odd ? word >> 8 : word, ((1u << LOW) - 1u) * 0x00010001u << place, magic);
                            if (F::HIGH) {
                                const int from = high_in_byte<LOW, F::HIGH>(s, w, row) + odd * 8;
                                const int shift = from - (place + LOW);
                                const u32 h = shift > 0 ? high[row] >> shift : high[row] << -shift;
                                q = and_or(h, ((1u << F::HIGH) - 1u) * 0x00010001u << (place + LOW), q);
                            }
                            const u32 zero = half_bits(-((1024 >> place) + F::OFFSET + HalfScales<F>::CENTER));
                            q = place ? fma_halves(q, same_halves(power_of_half(-place)), same_halves(zero)) : add_halves(q, same_halves(zero));
                        }
                        out[half * 2 + w][odd * 2 + row] =
                            F::HAS_ADD ? fma_halves(q, factors.mul(row, w), factors.add(row, w)) : mul_halves(q, factors.mul(row, w));
                    }
        }
    }
};

template <class F>
struct HalfOperands<F, 0> {  // grids, trits, signs: expanded to signed bytes as they are read
    u32 numbers[2][4];
    HalfScales<F> scales[2];
    __device__ __forceinline__ void load(const u8* chunk, int step, int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int quad = step >> 1, s = (step & 1) * 2 + half;
#pragma unroll
            for (int n = 0; n < 4; ++n) numbers[half][n] = F::numbers(chunk, quad, s, n & 1, lane, n >> 1);
            scales[half].load(chunk, quad, s, lane);
        }
    }
    __device__ __forceinline__ void make(const ChunkScales<F>& made, int step, int lane, u32, Operands& out) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            scales[half].make(made, step >> 1, (step & 1) * 2 + half, lane);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int w = n >> 2, odd = (n >> 1) & 1, row = n & 1;
                out[half * 2 + w][odd * 2 + row] =
                    mul_halves(halves_of_bytes(numbers[half][row * 2 + w], odd), scales[half].mul(row, w));
            }
        }
    }
};

template <class F>
struct HalfOperands<F, 16> {
    uint4 v[4];
    __device__ __forceinline__ void load(const u8* chunk, int step, int lane) {
#pragma unroll
        for (int group = 0; group < 4; ++group) v[group] = ((const uint4*)chunk)[(step * 4 + group) * 32 + lane];
    }
    __device__ __forceinline__ void make(const ChunkScales<F>&, int, int, u32, Operands& out) {
#pragma unroll
        for (int group = 0; group < 4; ++group) fragment_of(v[group], out[group]);
    }
};
