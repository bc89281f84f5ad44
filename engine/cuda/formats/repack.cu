// GGUF blocks -> packed layout (formats.cuh). Built once per format with FORMAT defined. Runs at load only.
// One warp per chunk: lane g*4+t gathers its own quants of rows g and g+8 and writes whole pieces.

template <class F, bool SCALED, bool WHOLE = (F::LOW == 0)>
struct Pack {
    // first/second: the blocks of rows g and g+8 in this chunk (null beyond the matrix), lane = g*4+t.
    DEVICE void lane_part(u8* chunk, const u8* const* first, const u8* const* second, int lane, float) {
        constexpr int LOWS = 2 * F::LOW, HIGHS = F::HIGH ? 2 * F::HIGH : 1;
        const int t = lane & 3;
        for (int quad = 0; quad < F::QUADS; ++quad) {
            u32 low[LOWS], high[HIGHS];
#pragma unroll
            for (int i = 0; i < LOWS; ++i) low[i] = 0;
#pragma unroll
            for (int i = 0; i < HIGHS; ++i) high[i] = 0;
#pragma unroll
            for (int n = 0; n < 16; ++n) {  // (s, w, row)
                const int s = n >> 2, w = (n >> 1) & 1, row = n & 1;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int k = quad * 128 + s * 32 + w * 16 + t * 4 + i;
                    const u8* block = (row ? second : first)[k / F::BLOCK];
                    const u32 q = block ? F::quant(block, k % F::BLOCK) : (u32)F::OFFSET;
                    // piece index and word in it, as low_word() places them
                    const int piece = F::LOW == 4 ? s >> 1 : F::LOW == 2 ? 0 : s;
                    low[piece * 4 + row * 2 + w] |= (q & ((1u << F::LOW) - 1u)) << low_bit<F::LOW>(s, i);
                    if (F::HIGH) {
                        const int word = F::HIGH == 2 ? (s >> 1) * 2 + row : F::LOW == 4 ? s >> 1 : row;
                        high[word % HIGHS] |= (q >> F::LOW) << high_bit<F::LOW, F::HIGH>(s, w, i, row);
                    }
                }
            }
            u32* at = (u32*)(chunk + quad * F::QUAD_LOW);
#pragma unroll
            for (int i = 0; i < LOWS; ++i) at[((i >> 2) * 32 + lane) * 4 + (i & 3)] = low[i];
            if (F::HIGH) {
                at = (u32*)(chunk + F::HIGH_AT + quad * F::QUAD_HIGH);
#pragma unroll
                for (int i = 0; i < HIGHS; ++i) at[lane * HIGHS + i] = high[i];
            }
        }
        F::pack_scales(chunk, first, second, lane >> 2, t);
    }
};

template <class F>
DEVICE float plain_value(const u8* p, float scale) {
    if (F::BLOCK_BYTES == 4) return __uint_as_float(load_u32_bytes(p)) * scale;
    return __uint_as_float(load_u16(p) << 16) * scale;  // bf16
}

template <class F>
struct Pack<F, true, true> {
    DEVICE void lane_part(u8* chunk, const u8* const* first, const u8* const* second, int lane, float) {
        F::pack(chunk, first[0], second[0], lane);
    }
};

template <class F>
struct Pack<F, false, false> {
    DEVICE void lane_part(u8* chunk, const u8* const* first, const u8* const* second, int lane, float scale) {
        constexpr int PIECES = F::LOW / 16;
        for (int n = 0; n < 16; ++n) {  // (s, w) and the register pair of one row
            const int sw = n >> 1, row = n & 1;
            for (int half = 0; half < 2; ++half) {
                u32 pair = 0, rest = 0;
                for (int i = 0; i < 2; ++i) {
                    const u8* p = (row ? second : first)[sw * 16 + (lane & 3) * 4 + half * 2 + i];
                    if (!p) continue;
                    if (!F::HAS_SCALE) {
                        pair |= load_u16(p) << (16 * i);
                        continue;
                    }
                    const float value = plain_value<F>(p, scale);
                    const u16 hi = float_to_half(value);
                    pair |= (u32)hi << (16 * i);
                    if (PIECES == 2) rest |= (u32)float_to_half(value - half_to_float(hi)) << (16 * i);
                }
                u32* at = (u32*)(chunk + (sw * PIECES * 32 + lane) * 16);
                at[half * 2 + row] = pair;
                if (PIECES == 2) at[128 + half * 2 + row] = rest;
            }
        }
    }
};

#ifdef FORMAT

// src, partner: packed rows of `row_bytes`; with a partner a tile is 8 rows of src over 8 rows of partner.
// scale: the matrix's {inverse, factor} for BF16 and F32, else null. grid * warps cover tiles * chunks.
extern "C" __global__ void JOIN(repack_, FORMAT)(const u8* src, const u8* partner, u8* dst, const float* scale, int rows,
                                                 int columns, i64 row_bytes, int chunks, i64 total) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
    const float factor = FORMAT::HAS_SCALE ? scale[1] : 1.0f;
    for (i64 unit = (i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); unit < total;
         unit += (i64)gridDim.x * (blockDim.x >> 5)) {
        const i64 tile = unit / chunks;
        const int chunk = (int)(unit % chunks);
        constexpr int COUNT = FORMAT::COLUMNS / FORMAT::BLOCK;
        const u8 *first[COUNT], *second[COUNT];
        const i64 row0 = partner ? tile * 8 + g : tile * 16 + g, row1 = partner ? tile * 8 + g : tile * 16 + 8 + g;
        for (int i = 0; i < COUNT; ++i) {
            const int block = chunk * COUNT + i;
            const bool inside = block * FORMAT::BLOCK < columns;
            const i64 at = (i64)block * FORMAT::BLOCK_BYTES;
            first[i] = inside && row0 < rows ? src + row0 * row_bytes + at : nullptr;
            second[i] = inside && row1 < rows ? (partner ? partner : src) + row1 * row_bytes + at : nullptr;
        }
        Pack<FORMAT, FORMAT::SCALED>::lane_part(dst + unit * FORMAT::CHUNK_BYTES, first, second, lane, factor);
    }
}

// BF16, F32: largest magnitude of `count` numbers as float bits into result[0] (zeroed before), by atomics on integers.
extern "C" __global__ void JOIN(largest_, FORMAT)(const u8* src, i64 count, u32* result) {
    u32 best = 0;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const u8* p = src + i * FORMAT::BLOCK_BYTES;
        const u32 bits = (FORMAT::BLOCK_BYTES == 4 ? load_u32_bytes(p) : load_u16(p) << 16) & 0x7fffffffu;
        if (bits < 0x7f800000u && bits > best) best = bits;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        const u32 other = __shfl_xor_sync(FULL_MASK, best, offset);
        best = other > best ? other : best;
    }
    if ((threadIdx.x & 31) == 0) atomicMax(result, best);
}

// scale = {2^-e, 2^e} with 2^e * largest in [2^14, 2^15).
extern "C" __global__ void JOIN(choose_scale_, FORMAT)(const u32* largest, float* scale) {
    int exponent = (int)(largest[0] >> 23);
    exponent = exponent < 20 ? 20 : exponent > 240 ? 240 : exponent;
    scale[0] = __uint_as_float((u32)(exponent - 14) << 23);
    scale[1] = __uint_as_float((u32)(268 - exponent) << 23);
}
#endif
