// How tiles of a float16 cache are fetched and multiplied in decode attention; joined before attention_decode_half.cu.

#define TILE 16
#define KEY_CHUNKS (KEY_DIM / 32)                           // 16 bytes a lane: 32 elements of 8 positions
#define KEY_TAIL (KEY_DIM % 32 != 0)                        // 8 bytes a lane: 16 elements
#define VALUE_CHUNKS (VALUE_DIM / 64)                       // 16 bytes a lane: 64 elements of 4 positions
#define VALUE_TAIL32 (VALUE_DIM % 64 >= 32)                 // 8 bytes a lane
#define VALUE_TAIL16 (VALUE_DIM % 32 != 0)                  // 4 bytes a lane
#define KEY_STRIDE ((KEY_DIM * 2 + 63) / 128 * 128 + 64)    // = 64 mod 128: phases read 64 bytes of two rows
#define VALUE_STRIDE ((VALUE_DIM * 2 + 47) / 64 * 64 + 16)  // = 16 mod 64: phases read 32 bytes of rows 0, 2, 4, 6
#define VALUES_IN_SLOT (TILE * KEY_STRIDE)
#define TILE_BYTES (TILE * (KEY_STRIDE + VALUE_STRIDE))

// The 16 rows of a tile are contiguous in the cache; rows from `high` on become zeros (0 * garbage may be NaN), and so
// does a tile without a page. Rows before a window's first position are finite values, as all that was cached.
template <int DIM, int STRIDE>
DEVICE void copy_rows(u8* to, const cache_t* cache, int start, int high, int page) {
    const int lane = threadIdx.x & 31;
    const u16* from = cache + cache_row(max(page, 0), kv_head_of_block(), start) * DIM;
    if (page < 0) high = start;
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
        const int n = i * WARP + lane, row = n / (DIM / 8), chunk = n % (DIM / 8);
        copy_async<16>(to + row * STRIDE + chunk * 16, from + n * 8, start + row < high);
    }
}

// Scores of 8 heads and a tile's positions: s[2n], s[2n+1] are those of head g and positions 8n + 2t, 8n + 2t + 1. query(i)
// is the i-th fragment, see store_fragments().
template <class Query>
DEVICE void score_tile(float (&s)[TILE / 4], const u8* slot, Query query, const float*) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    float sums[2][2][4] = {};  // positions 0-7 and 8-15; two sums each, for shorter chains
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; ++c) {
        const uint4 q0 = query(2 * c), q1 = query(2 * c + 1);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint4 k = *(const uint4*)(slot + (8 * n + g) * KEY_STRIDE + 64 * c + 16 * t);
            mma16(sums[n][0], q0.x, q0.y, q0.z, q0.w, k.x, k.y);
            mma16(sums[n][1], q1.x, q1.y, q1.z, q1.w, k.z, k.w);
        }
    }
    if (KEY_TAIL) {
        const uint4 last = query(KEY_DIM / 16 - 1);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint2 k = *(const uint2*)(slot + (8 * n + g) * KEY_STRIDE + 64 * KEY_CHUNKS + 8 * t);
            mma16(sums[n][0], last.x, last.y, last.z, last.w, k.x, k.y);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        s[i] = (sums[i >> 1][0][i & 1] + sums[i >> 1][1][i & 1]) +
               (sums[i >> 1][0][(i & 1) + 2] + sums[i >> 1][1][(i & 1) + 2]);
}

DEVICE void note_offset(float*, int, int, u32, u32) {}

// Rows 2i and 2i+1 of V^T from words of four positions, times the weights.
DEVICE void add_values(float (&o)[4], u32 r0, u32 r1, u32 r2, u32 r3, const u32 (&hi)[2], const u32 (&lo)[2]) {
    const u32 a0 = __byte_perm(r0, r1, 0x5410), a1 = __byte_perm(r0, r1, 0x7632);
    const u32 a2 = __byte_perm(r2, r3, 0x5410), a3 = __byte_perm(r2, r3, 0x7632);
    mma16(o, a0, a1, a2, a3, hi[0], hi[1]);
    mma16(o, a0, a1, a2, a3, lo[0], lo[1]);
}

// First element of a value head that accumulator i of a lane holds: o[i][0], o[i][2] are elements d, d+1 of head 2t.
DEVICE int value_of(int i, int g) {
    if (i < 4 * VALUE_CHUNKS) return 64 * (i / 4) + 8 * g + 2 * (i % 4);
    i -= 4 * VALUE_CHUNKS;
    if (VALUE_TAIL32 && i < 2) return 64 * VALUE_CHUNKS + 4 * g + 2 * i;
    return 64 * VALUE_CHUNKS + VALUE_TAIL32 * 32 + 2 * g;
}

// o += weights x values of the tile's positions 16 part .. 16 part + 15.
DEVICE void add_positions(float (&o)[VALUE_DIM / 16][4], const u8* slot, int part, const u32 (&hi)[2], const u32 (&lo)[2]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    // This lane's: 2t, 2t+1, 2t+8, 2t+9.
    const u8* values = slot + VALUES_IN_SLOT + (16 * part + 2 * t) * VALUE_STRIDE;
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; ++c) {
        uint4 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            r[i] = *(const uint4*)(values + ((i & 1) + 8 * (i >> 1)) * VALUE_STRIDE + 128 * c + 16 * g);
        add_values(o[4 * c], r[0].x, r[1].x, r[2].x, r[3].x, hi, lo);
        add_values(o[4 * c + 1], r[0].y, r[1].y, r[2].y, r[3].y, hi, lo);
        add_values(o[4 * c + 2], r[0].z, r[1].z, r[2].z, r[3].z, hi, lo);
        add_values(o[4 * c + 3], r[0].w, r[1].w, r[2].w, r[3].w, hi, lo);
    }
    values += 128 * VALUE_CHUNKS;
    if (VALUE_TAIL32) {
        uint2 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            r[i] = *(const uint2*)(values + ((i & 1) + 8 * (i >> 1)) * VALUE_STRIDE + 8 * g);
        add_values(o[4 * VALUE_CHUNKS], r[0].x, r[1].x, r[2].x, r[3].x, hi, lo);
        add_values(o[4 * VALUE_CHUNKS + VALUE_TAIL32], r[0].y, r[1].y, r[2].y, r[3].y, hi, lo);
        values += 64;
    }
    if (VALUE_TAIL16) {
        u32 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            r[i] = *(const u32*)(values + ((i & 1) + 8 * (i >> 1)) * VALUE_STRIDE + 4 * g);
        add_values(o[VALUE_DIM / 16 - 1], r[0], r[1], r[2], r[3], hi, lo);
    }
}
