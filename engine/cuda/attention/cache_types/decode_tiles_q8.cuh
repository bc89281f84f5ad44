// How tiles of a cache of 8 bits are fetched and multiplied in decode attention; joined before attention_decode_half.cu.
//
// Keys are multiplied as whole numbers, exactly, and sums of a block by its scale in float32: bytes q + 128, from whose sums
// 128 times the sum of the query's block is taken. Values times their scale, and weights, are rounded to float16, as
// prompts do it. A tile takes as many bytes as one of a float16 cache does.
// Needs bytes_as_halves.cuh.

#define TILE 32
#define KEY_CHUNKS (KEY_DIM / BLOCK)    // 8 bytes a lane: a block of 8 positions
#define VALUE_CHUNKS (VALUE_DIM / 128)  // 16 bytes a lane: 128 elements of 4 positions
#define VALUE_TAIL64 (VALUE_DIM % 128 >= 64)
#define VALUE_TAIL32 (VALUE_DIM % 64 != 0)
#define KEY_STRIDE ((KEY_DIM + 95) / 128 * 128 + 32)    // = 32 mod 128: phases read 32 bytes of four rows
#define VALUE_STRIDE ((VALUE_DIM + 47) / 64 * 64 + 16)  // = 16 mod 64: phases read 32 bytes of rows 0, 2, 4, 6
#define SCALE_BYTES(dim) ((dim) / BLOCK * 2)            // of a position
#define VALUES_IN_SLOT (TILE * (KEY_STRIDE + SCALE_BYTES(KEY_DIM)))
#define TILE_BYTES (VALUES_IN_SLOT + TILE * (VALUE_STRIDE + SCALE_BYTES(VALUE_DIM)))

// The rows of a tile, and behind them their scales, which are contiguous in the cache, too. Rows from `high` on become
// zeros or stay what was cached there, which is finite; a tile without a page becomes zeros.
template <int DIM, int STRIDE>
DEVICE void copy_rows(u8* to, const cache_t* cache, int start, int high, int page) {
    constexpr int SCALES = TILE * SCALE_BYTES(DIM);
    static_assert(SCALES % 16 == 0 && SCALES <= 16 * WARP, "a copy a lane");
    const int lane = threadIdx.x & 31;
    const CachedRow<DIM> from(cache, max(page, 0), kv_head_of_block(), start);
    if (page < 0) high = start;
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
        const int n = i * WARP + lane, row = n / (DIM / 16), chunk = n % (DIM / 16);
        copy_async<16>(to + row * STRIDE + chunk * 16, from.bytes + n * 16, start + row < high);
    }
    if (lane < SCALES / 16)
        copy_async<16>(to + TILE * STRIDE + lane * 16, (const u8*)from.scales + lane * 16,
                       start + lane * 16 / SCALE_BYTES(DIM) < high);
}

// A position's scales, two in a word.
template <int BLOCKS>
DEVICE void load_scales(u32 (&to)[(BLOCKS + 1) / 2], const u8* from) {
    if (BLOCKS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < BLOCKS / 4; ++i) {
            const uint2 v = ((const uint2*)from)[i];
            to[2 * i] = v.x, to[2 * i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < (BLOCKS + 1) / 2; ++i)
            to[i] = BLOCKS % 2 == 0 ? ((const u32*)from)[i]
                                    : ((const u16*)from)[2 * i] | (2 * i + 1 < BLOCKS ? ((const u16*)from)[2 * i + 1] : 0) << 16;
    }
}

// Scores of 8 heads and a tile's positions: s[2n], s[2n+1] are those of head g and positions 8n + 2t, 8n + 2t + 1. query(i)
// is the i-th fragment, see store_fragments(); offsets [KEY_CHUNKS][8]: what note_offset() left.
template <class Query>
DEVICE void score_tile(float (&s)[TILE / 4], const u8* slot, Query query, const float* offsets) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    u32 scales[TILE / 4][(KEY_CHUNKS + 1) / 2];
#pragma unroll
    for (int i = 0; i < TILE / 4; ++i) {
        load_scales<KEY_CHUNKS>(scales[i],
                                slot + TILE * KEY_STRIDE + (8 * (i / 2) + 2 * t + i % 2) * SCALE_BYTES(KEY_DIM));
        s[i] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; ++c) {
        const uint4 q0 = query(2 * c), q1 = query(2 * c + 1);
        const float offset = offsets[8 * c + g];
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const uint2 k = *(const uint2*)(slot + (8 * n + g) * KEY_STRIDE + BLOCK * c + 8 * t);
            float sums[4] = {offset, offset, 0.0f, 0.0f};
            mma16(sums, q0.x, q0.y, q0.z, q0.w, bytes_of(k.x, 0), bytes_of(k.x, 1));
            mma16(sums, q1.x, q1.y, q1.z, q1.w, bytes_of(k.y, 0), bytes_of(k.y, 1));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 pair = scales[2 * n + i][c / 2];
                s[2 * n + i] = fmaf(sums[i] + sums[i + 2], c % 2 ? high_half(pair) : low_half(pair), s[2 * n + i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILE / 4; ++i) s[i] *= 1.0f / BYTE_UNIT;
}

// Of a head's query: hi and lo are two neighbours, `pair` their number, one a lane. Whole warp, after store_fragments().
DEVICE void note_offset(float* offsets, int head, int pair, u32 hi, u32 lo) {
    float sum = (low_half(hi) + high_half(hi)) + (low_half(lo) + high_half(lo));
#pragma unroll
    for (int offset = BLOCK / 4; offset > 0; offset >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, offset);
    if (pair % (BLOCK / 2) == 0 && pair < KEY_DIM / 2) offsets[8 * (pair / (BLOCK / 2)) + head] = -128.0f * BYTE_UNIT * sum;
}

struct ValueScales {  // of positions 2t, 2t+1 and 2t+8, 2t+9, of one block
    u32 first, second;
};

// Four rows of V^T from words of four positions, times the weights: two accumulators.
DEVICE void add_values(float (&o0)[4], float (&o1)[4], u32 r0, u32 r1, u32 r2, u32 r3, ValueScales scales, const u32 (&weights)[2]) {
    auto add = [&](float (&o)[4], u32 left, u32 right) {
        const u32 a0 = mul_halves(quants_of(left, 0), scales.first), a1 = mul_halves(quants_of(left, 1), scales.first);
        const u32 a2 = mul_halves(quants_of(right, 0), scales.second), a3 = mul_halves(quants_of(right, 1), scales.second);
        mma16(o, a0, a1, a2, a3, weights[0], weights[1]);
    };
    add(o0, __byte_perm(r0, r1, 0x5140), __byte_perm(r2, r3, 0x5140));
    add(o1, __byte_perm(r0, r1, 0x7362), __byte_perm(r2, r3, 0x7362));
}

// First element of a value head that accumulator i of a lane holds: o[i][0], o[i][2] are elements d, d+1 of head 2t.
DEVICE int value_of(int i, int g) {
    if (i < 8 * VALUE_CHUNKS) return 128 * (i / 8) + 16 * g + 2 * (i % 8);
    i -= 8 * VALUE_CHUNKS;
    if (VALUE_TAIL64 && i < 4) return 128 * VALUE_CHUNKS + 8 * g + 2 * i;
    return VALUE_DIM - 32 + 4 * g + 2 * (i % 2);
}

// o += weights x values of the tile's positions 16 part .. 16 part + 15.
DEVICE void add_positions(float (&o)[VALUE_DIM / 16][4], const u8* slot, int part, const u32 (&weights)[2], const u32 (&)[2]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int row = 16 * part + 2 * t;  // this lane's rows: 2t, 2t+1, 2t+8, 2t+9
    const u8* values = slot + VALUES_IN_SLOT + row * VALUE_STRIDE;
    const u16* const scales = (const u16*)(slot + VALUES_IN_SLOT + TILE * VALUE_STRIDE) + row * (VALUE_DIM / BLOCK);
    auto scales_of = [&](int block) {
        constexpr int BLOCKS = VALUE_DIM / BLOCK;
        const u16* const at = scales + block;
        return ValueScales{at[0] | (u32)at[BLOCKS] << 16, at[8 * BLOCKS] | (u32)at[9 * BLOCKS] << 16};
    };
    auto at = [&](int i) { return values + ((i & 1) + 8 * (i >> 1)) * VALUE_STRIDE; };
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; ++c) {
        const ValueScales scale = scales_of(4 * c + g / 2);
        uint4 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = *(const uint4*)(at(i) + 128 * c + 16 * g);
        float(*const to)[4] = o + 8 * c;
        add_values(to[0], to[1], r[0].x, r[1].x, r[2].x, r[3].x, scale, weights);
        add_values(to[2], to[3], r[0].y, r[1].y, r[2].y, r[3].y, scale, weights);
        add_values(to[4], to[5], r[0].z, r[1].z, r[2].z, r[3].z, scale, weights);
        add_values(to[6], to[7], r[0].w, r[1].w, r[2].w, r[3].w, scale, weights);
    }
    if (VALUE_TAIL64) {
        const ValueScales scale = scales_of(4 * VALUE_CHUNKS + g / 4);
        uint2 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = *(const uint2*)(at(i) + 128 * VALUE_CHUNKS + 8 * g);
        float(*const to)[4] = o + 8 * VALUE_CHUNKS;
        add_values(to[0], to[VALUE_TAIL64], r[0].x, r[1].x, r[2].x, r[3].x, scale, weights);
        add_values(to[2 * VALUE_TAIL64], to[3 * VALUE_TAIL64], r[0].y, r[1].y, r[2].y, r[3].y, scale, weights);
    }
    if (VALUE_TAIL32) {
        const ValueScales scale = scales_of(VALUE_DIM / BLOCK - 1);
        u32 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = *(const u32*)(at(i) + VALUE_DIM - 32 + 4 * g);
        float(*const to)[4] = o + VALUE_DIM / 16 - 2;
        add_values(to[0], to[1], r[0], r[1], r[2], r[3], scale, weights);
    }
}
