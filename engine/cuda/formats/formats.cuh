// The packed layouts of quantized matrices: one struct per GGUF block format.
//
// A matrix is cut into tiles of 16 rows, a tile into chunks of COLUMNS columns; chunks are stored tile after tile, column
// after column. A chunk takes exactly the bytes its GGUF blocks took. Words are used below:
//   quad   128 columns of a chunk (QUADS per chunk); sub-block s (0..3): 32 columns of a quad; group w (0..1): 16 of them
//   lane   g * 4 + t, the mma lane that owns rows g and g + 8 ("row" 0 and 1) and columns 4t .. 4t+3 of every group
//   slot   a sub-block's place s in its quad, where its scales are kept
// so the four quants of (quad, s, w, row) are one register of mma.m16n8k32: a0 a1 (w 0, row 0 1), a2 a3 (w 1).
// Planes of a chunk, in this order, each lane-major with 16-byte (LOW) or 8/16-byte (HIGH) pieces per lane:
//   LOW  bits of every quant: 4 -> one piece per two sub-blocks, 2 -> one per quad, 8 -> one per sub-block,
//        16 -> one per group (halfs), 32 -> two per group (half, and the half of what it misses);
//        byte i of word row * 2 + w has the bits of column 4t + i of all the sub-blocks of the piece
//   HIGH bits of every quant: 0, 1 or 2, again in byte i of a word
//   scales, per (g, slot); then d/dmin per g where the format has super-blocks
// A value is mul * (q - OFFSET) + add, q >= 0 (LOW 8: signed), mul and add per group of 32 (GROUPS 1) or 16 (GROUPS 2) columns.
// Formats whose bits are not the number itself (CODED) are in formats_coded.cuh. Some, and all of those, have numbers() (BYTES):
// one lane's four quants of (quad, s, w, row), less OFFSET, as signed bytes.
// Block formats: ggml-common.h of ggml; decoding: dequantize_row_* in ggml-quants.c.

// The name of a kernel that is built once per format: JOIN(embed_, FORMAT).
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

struct Scales {
    u32 a, b, c, d;
};

DEVICE u32 load_u16(const u8* p) { return (u32)p[0] | ((u32)p[1] << 8); }
DEVICE u32 load_u32_bytes(const u8* p) { return load_u16(p) | (load_u16(p + 2) << 16); }
DEVICE u32 word_at(const u8* p) { return *(const u32*)p; }

// 2^23 + v is the float with bits 0x4b000000 | v.
DEVICE float small_to_float(u32 v) { return __uint_as_float(0x4b000000u | v) - 8388608.0f; }

// Field i of eight 6-bit fields kept in 48 bits.
DEVICE u32 six_bits(u32 low, u32 high, int i) {
    const int at = 6 * i;
    if (at <= 26) return (low >> at) & 63u;
    if (at >= 32) return (high >> (at - 32)) & 63u;
    return __funnelshift_r(low, high, at) & 63u;
}

// ---- where a quant's bits are --------------------------------------------------------------------------------
// Low bits: byte offset of the 32-bit word in a quad's LOW plane, and the bit position of quant i (0..3).
template <int LOW>
DEVICE int low_word(int s, int w, int lane, int row) {
    if (LOW == 4) return ((s >> 1) * 32 + lane) * 16 + (row * 2 + w) * 4;
    if (LOW == 2) return lane * 16 + (row * 2 + w) * 4;
    return (s * 32 + lane) * 16 + (row * 2 + w) * 4;
}
template <int LOW>
DEVICE int low_bit(int s, int i) {
    if (LOW == 8) return i * 8;
    return i * 8 + (LOW == 4 ? (s & 1) * 4 : s * 2);
}

// High bits.
template <int LOW, int HIGH>
DEVICE int high_word(int s, int lane, int row) {
    if (HIGH == 2) return lane * 16 + ((s >> 1) * 2 + row) * 4;
    if (LOW == 4) return lane * 8 + (s >> 1) * 4;
    return lane * 8 + row * 4;
}
template <int LOW, int HIGH>
DEVICE int high_in_byte(int s, int w, int row) {
    if (HIGH == 2) return ((s & 1) * 2 + w) * 2;
    if (LOW == 4) return (s & 1) * 4 + row * 2 + w;
    return s * 2 + w;
}
template <int LOW, int HIGH>
DEVICE int high_bit(int s, int w, int i, int row) {
    return i * 8 + high_in_byte<LOW, HIGH>(s, w, row);
}

// ---- format descriptions -------------------------------------------------------------------------------------
template <int BLOCK_, int BYTES_, int LOW_, int HIGH_, int GROUPS_, int OFFSET_, bool HAS_ADD_>
struct Blocks {
    static constexpr int BLOCK = BLOCK_, BLOCK_BYTES = BYTES_;
    static constexpr int LOW = LOW_, HIGH = HIGH_, GROUPS = GROUPS_, OFFSET = OFFSET_;
    static constexpr bool HAS_ADD = HAS_ADD_, SCALED = true, HAS_SCALE = false;
    static constexpr bool CODED = false, BYTES = false;
    static constexpr int COLUMNS = BLOCK == 256 ? 256 : 128, QUADS = COLUMNS / 128;
    static constexpr int CHUNK_BYTES = 16 * (COLUMNS / BLOCK) * BLOCK_BYTES;
    static constexpr int QUAD_LOW = 256 * LOW, QUAD_HIGH = 256 * HIGH;
    static constexpr int HIGH_AT = QUADS * QUAD_LOW, SCALES_AT = HIGH_AT + QUADS * QUAD_HIGH;
};

// Plain formats of 32 quants: a half scale, some with a half minimum. Scales plane: [g][slot] pair of halfs (row 0, 1),
// then the same of the minimums.
template <int BYTES_, int LOW_, int HIGH_, int OFFSET_, bool HAS_ADD_>
struct Plain : Blocks<32, BYTES_, LOW_, HIGH_, 1, OFFSET_, HAS_ADD_> {
    typedef Blocks<32, BYTES_, LOW_, HIGH_, 1, OFFSET_, HAS_ADD_> Base;
    static constexpr int QS = 2 + (HAS_ADD_ ? 2 : 0) + (HIGH_ ? 4 : 0);

    DEVICE u32 quant(const u8* block, int k) {
        if (LOW_ == 8) return block[2 + k];
        const u32 byte = block[QS + (k & 15)];
        u32 q = k < 16 ? byte & 15u : byte >> 4;
        if (HIGH_) q |= ((load_u32_bytes(block + QS - 4) >> k) & 1u) << 4;
        return q;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u32* plane = (u32*)(chunk + Base::SCALES_AT);
        const u8 *a = first[t], *b = second[t];
        plane[g * 4 + t] = (a ? load_u16(a) : 0u) | ((b ? load_u16(b) : 0u) << 16);
        if (HAS_ADD_) plane[32 + g * 4 + t] = (a ? load_u16(a + 2) : 0u) | ((b ? load_u16(b + 2) : 0u) << 16);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + Base::SCALES_AT + (g * 4 + slot) * 4;
        Scales r = {word_at(plane), 0u, 0u, 0u};
        if (HAS_ADD_) r.b = word_at(plane + 128);
        return r;
    }
    DEVICE float mul(const Scales& s, int, int row, int) { return row ? high_half(s.a) : low_half(s.a); }
    DEVICE float add(const Scales& s, int, int row, int) {
        return HAS_ADD_ ? (row ? high_half(s.b) : low_half(s.b)) : 0.0f;
    }
};

struct Q4_0 : Plain<18, 4, 0, 8, false> {};   // half d; 16 bytes: low nibbles first, then high
struct Q4_1 : Plain<20, 4, 0, 0, true> {};    // half d, m; 16 bytes
struct Q5_0 : Plain<22, 4, 1, 16, false> {};  // half d; 32 fifth bits; 16 bytes
struct Q5_1 : Plain<24, 4, 1, 0, true> {};    // half d, m; 32 fifth bits; 16 bytes
struct Q8_0 : Plain<34, 8, 0, 0, false> {};   // half d; 32 signed bytes

// Four halfs of super-block scales, rows g and g + 8: [g] d0 m0 d1 m1.
DEVICE void pack_super(u8* plane, u32 first, u32 second, int g) {
    ((u32*)plane)[g * 2] = first;
    ((u32*)plane)[g * 2 + 1] = second;
}

DEVICE void pack_six(u8* plane, const u32* v, int g, int t) {
    u64 bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (u64)v[i] << (6 * i);
    ((u32*)plane)[g * 4 + t] = (u32)bits;
    ((u16*)(plane + 128))[g * 4 + t] = (u16)(bits >> 32);
}

// Q4_K, Q5_K. Block: half d, dmin; 12 bytes: 8 six-bit scales and minimums; Q5_K: 32 bytes of fifth bits; 128 bytes.
// Scales plane: 48 bits per (g, slot), field quad*4 + row*2 + (0 scale, 1 minimum); [g] d0 m0 d1 m1.
template <int BYTES_, int HIGH_>
struct K45 : Blocks<256, BYTES_, 4, HIGH_, 1, 0, true> {
    typedef Blocks<256, BYTES_, 4, HIGH_, 1, 0, true> Base;
    DEVICE u32 quant(const u8* block, int k) {
        const u32 byte = block[(HIGH_ ? 48 : 16) + (k >> 6) * 32 + (k & 31)];
        u32 q = (k & 32) ? byte >> 4 : byte & 15u;
        if (HIGH_) q |= ((block[16 + (k & 31)] >> (k >> 5)) & 1u) << 4;
        return q;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u32 v[8];
        for (int i = 0; i < 4; ++i) {
            const u8* block = (i & 1) ? second[0] : first[0];
            const int j = (i >> 1) * 4 + t, at = (i >> 1) * 4 + (i & 1) * 2;
            v[at] = v[at + 1] = 0;
            if (!block) continue;
            const u8* s = block + 4;
            v[at] = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
            v[at + 1] = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
        }
        u8* plane = chunk + Base::SCALES_AT;
        pack_six(plane, v, g, t);
        if (t == 0)
            pack_super(plane + 192, first[0] ? load_u32_bytes(first[0]) : 0u, second[0] ? load_u32_bytes(second[0]) : 0u,
                       g);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + Base::SCALES_AT;
        return {word_at(plane + (g * 4 + slot) * 4), *(const u16*)(plane + 128 + (g * 4 + slot) * 2),
                word_at(plane + 192 + g * 8), word_at(plane + 196 + g * 8)};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        return low_half(row ? s.d : s.c) * small_to_float(six_bits(s.a, s.b, quad * 4 + row * 2));
    }
    DEVICE float add(const Scales& s, int quad, int row, int) {
        return -high_half(row ? s.d : s.c) * small_to_float(six_bits(s.a, s.b, quad * 4 + row * 2 + 1));
    }
};
struct Q4_K : K45<144, 0> {};
struct Q5_K : K45<176, 1> {};

// Block: 128 bytes of low nibbles, 64 bytes of high pairs, 16 signed scales, half d.
// Scales plane: [quad][g][slot] four bytes, scale + 128 of (row, group); [g] d0 d1.
struct Q6_K : Blocks<256, 210, 4, 2, 2, 32, false> {
    DEVICE u32 quant(const u8* block, int k) {
        const int n = k >> 7, part = (k >> 5) & 3, l = k & 31;
        const u32 byte = block[n * 64 + (part & 1) * 32 + l];
        return ((part & 2) ? byte >> 4 : byte & 15u) | (((block[128 + n * 32 + l] >> (2 * part)) & 3u) << 4);
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u8* plane = chunk + SCALES_AT;
        for (int quad = 0; quad < 2; ++quad) {
            u32 v = 0x80808080u;
            for (int i = 0; i < 4; ++i) {
                const u8* block = (i & 2) ? second[0] : first[0];
                if (block) v ^= (u32)block[192 + quad * 8 + t * 2 + (i & 1)] << (8 * i);
            }
            ((u32*)plane)[quad * 32 + g * 4 + t] = v;
        }
        if (t == 0)
            ((u32*)(plane + 256))[g] =
                (first[0] ? load_u16(first[0] + 208) : 0u) | ((second[0] ? load_u16(second[0] + 208) : 0u) << 16);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + SCALES_AT + (g * 4 + slot) * 4;
        return {word_at(plane), word_at(plane + 128), word_at(chunk + SCALES_AT + 256 + g * 4), 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int group) {
        const u32 biased = __byte_perm(quad ? s.b : s.a, 0x4b000000u, 0x7650 + row * 2 + group);
        return (row ? high_half(s.c) : low_half(s.c)) * (__uint_as_float(biased) - 8388736.0f);
    }
    DEVICE float add(const Scales&, int, int, int) { return 0.0f; }
};

// Block: 16 bytes: scale (low nibble) and minimum of 16 quants; 64 bytes of pairs; half d, dmin.
// Scales plane: [quad][g][slot] the four bytes of (row, group); [g] d0 m0 d1 m1.
struct Q2_K : Blocks<256, 84, 2, 0, 2, 0, true> {
    DEVICE u32 quant(const u8* block, int k) {
        return (block[16 + (k >> 7) * 32 + (k & 31)] >> (2 * ((k >> 5) & 3))) & 3u;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u8* plane = chunk + SCALES_AT;
        for (int quad = 0; quad < 2; ++quad) {
            u32 v = 0;
            for (int i = 0; i < 4; ++i) {
                const u8* block = (i & 2) ? second[0] : first[0];
                if (block) v |= (u32)block[quad * 8 + t * 2 + (i & 1)] << (8 * i);
            }
            ((u32*)plane)[quad * 32 + g * 4 + t] = v;
        }
        if (t == 0)
            pack_super(plane + 256, first[0] ? load_u32_bytes(first[0] + 80) : 0u,
                       second[0] ? load_u32_bytes(second[0] + 80) : 0u, g);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + SCALES_AT;
        return {word_at(plane + (g * 4 + slot) * 4), word_at(plane + 128 + (g * 4 + slot) * 4),
                word_at(plane + 256 + g * 8), word_at(plane + 260 + g * 8)};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int group) {
        return low_half(row ? s.d : s.c) *
               small_to_float(((quad ? s.b : s.a) >> (8 * (row * 2 + group))) & 15u);
    }
    DEVICE float add(const Scales& s, int quad, int row, int group) {
        return -high_half(row ? s.d : s.c) *
               small_to_float(((quad ? s.b : s.a) >> (8 * (row * 2 + group) + 4)) & 15u);
    }
};

// Block: 32 bytes of third bits, 64 bytes of pairs, 12 bytes: 16 six-bit scales + 32; half d.
// Scales plane: 48 bits per (g, slot), field quad*4 + row*2 + group; [g] d0 d1.
struct Q3_K : Blocks<256, 110, 2, 1, 2, 4, false> {
    DEVICE u32 quant(const u8* block, int k) {
        const u32 low = (block[32 + (k >> 7) * 32 + (k & 31)] >> (2 * ((k >> 5) & 3))) & 3u;
        return low | (((block[k & 31] >> (k >> 5)) & 1u) << 2);
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u32 v[8];
        for (int i = 0; i < 8; ++i) {
            const u8* block = (i & 2) ? second[0] : first[0];
            const int j = (i >> 2) * 8 + t * 2 + (i & 1);
            v[i] = 32;
            if (!block) continue;
            const u8* s = block + 96;
            v[i] = ((j < 8 ? s[j] : s[j - 8] >> 4) & 15u) | (((s[8 + (j & 3)] >> (2 * (j >> 2))) & 3u) << 4);
        }
        u8* plane = chunk + SCALES_AT;
        pack_six(plane, v, g, t);
        if (t == 0)
            ((u32*)(plane + 192))[g] =
                (first[0] ? load_u16(first[0] + 108) : 0u) | ((second[0] ? load_u16(second[0] + 108) : 0u) << 16);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + SCALES_AT;
        return {word_at(plane + (g * 4 + slot) * 4), *(const u16*)(plane + 128 + (g * 4 + slot) * 2),
                word_at(plane + 192 + g * 4), 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int group) {
        const u32 biased = 0x4b000000u | six_bits(s.a, s.b, quad * 4 + row * 2 + group);
        return (row ? high_half(s.c) : low_half(s.c)) * (__uint_as_float(biased) - 8388640.0f);
    }
    DEVICE float add(const Scales&, int, int, int) { return 0.0f; }
};

// Halfs of rows g and g + 8, zero beyond the matrix.
DEVICE u32 half_pair(const u8* first, const u8* second) {
    return (first ? load_u16(first) : 0u) | ((second ? load_u16(second) : 0u) << 16);
}

// One less than each of four small bytes, signed.
DEVICE u32 less_one(u32 bytes) { return ((bytes | 0x80808080u) - 0x01010101u) ^ 0x80808080u; }

// Two bits less one, a half d: TQ2_0 of 256 in Q2_K's order (64 bytes, then d), Q2_0 of 64 in order (d, then 16 bytes).
// Scales plane: [g][block] d of row 0, 1.
template <int BLOCK_, int BYTES_>
struct TwoBits : Blocks<BLOCK_, BYTES_, 2, 0, 1, 1, false> {
    typedef Blocks<BLOCK_, BYTES_, 2, 0, 1, 1, false> Base;
    static constexpr int COUNT = Base::COLUMNS / BLOCK_, D = BLOCK_ == 256 ? 64 : 0;
    static constexpr bool BYTES = true;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        return less_one((word_at(chunk + quad * Base::QUAD_LOW + low_word<2>(s, w, lane, row)) >> (2 * s)) & 0x03030303u);
    }
    DEVICE u32 quant(const u8* block, int k) {
        if (BLOCK_ == 256) return (block[(k >> 7) * 32 + (k & 31)] >> (2 * ((k >> 5) & 3))) & 3u;
        return (block[2 + (k >> 2)] >> (2 * (k & 3))) & 3u;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        if (t < COUNT)
            ((u32*)(chunk + Base::SCALES_AT))[g * COUNT + t] =
                half_pair(first[t] ? first[t] + D : nullptr, second[t] ? second[t] + D : nullptr);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {word_at(chunk + Base::SCALES_AT + (g * COUNT + (slot * COUNT >> 2)) * 4), 0u, 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int, int row, int) { return row ? high_half(s.a) : low_half(s.a); }
    DEVICE float add(const Scales&, int, int, int) { return 0.0f; }
};
struct TQ2_0 : TwoBits<256, 66> {};
struct Q2_0 : TwoBits<64, 18> {};

// Signed bytes times a float, of which only these are kept: Q8_1 (float d, sum; 32 bytes), Q8_K (float d; 256 bytes; sums).
// Scales plane: [g][block] d of row 0, 1.
template <int BLOCK_, int BYTES_, int QS>
struct WideScale : Blocks<BLOCK_, BYTES_, 8, 0, 1, 0, false> {
    typedef Blocks<BLOCK_, BYTES_, 8, 0, 1, 0, false> Base;
    static constexpr int COUNT = Base::COLUMNS / BLOCK_, CHUNK_BYTES = 16 * COUNT * (BLOCK_ + 4);
    static constexpr bool BYTES = true;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        return word_at(chunk + quad * Base::QUAD_LOW + low_word<8>(s, w, lane, row));
    }
    DEVICE u32 quant(const u8* block, int k) { return block[QS + k]; }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        if (t >= COUNT) return;
        u32* at = (u32*)(chunk + Base::SCALES_AT) + (g * COUNT + t) * 2;
        at[0] = first[t] ? load_u32_bytes(first[t]) : 0u;
        at[1] = second[t] ? load_u32_bytes(second[t]) : 0u;
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* at = chunk + Base::SCALES_AT + (g * COUNT + (slot * COUNT >> 2)) * 8;
        return {word_at(at), word_at(at + 4), 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int, int row, int) { return __uint_as_float(row ? s.b : s.a); }
    DEVICE float add(const Scales&, int, int, int) { return 0.0f; }
};
struct Q8_1 : WideScale<32, 40, 8> {};
struct Q8_K : WideScale<256, 292, 4> {};

// Unquantized matrices. BF16 and F32 are multiplied by a power of two per matrix (its inverse is kept beside the
// data) so that the largest weight is near 2^14: halfs then hold every bf16 down to 2^-31 of the largest exactly.
template <int BYTES_, bool HAS_SCALE_>
struct Wide {
    static constexpr int BLOCK = 1, BLOCK_BYTES = BYTES_, COLUMNS = 128, QUADS = 1, LOW = 8 * BYTES_, HIGH = 0;
    static constexpr int GROUPS = 1, OFFSET = 0, CHUNK_BYTES = 16 * 128 * BYTES_, QUAD_LOW = CHUNK_BYTES;
    static constexpr bool HAS_ADD = false, SCALED = false, HAS_SCALE = HAS_SCALE_, CODED = false, BYTES = false;
};
struct F16 : Wide<2, false> {};
struct BF16 : Wide<2, true> {};
struct F32 : Wide<4, true> {};

// ---- one lane's four values of (quad, s, w, row), exactly as ggml rounds them ---------------------------------
template <class F, bool SCALED>
struct Unpack {
    DEVICE void four(const u8* chunk, int quad, int s, int w, int lane, int row, float, float* value) {
        const Scales scales = F::load(chunk, lane >> 2, s);
        const float mul = F::mul(scales, quad, row, w), add = F::add(scales, quad, row, w);
        if constexpr (F::CODED) {
            const u32 numbers = F::numbers(chunk, quad, s, w, lane, row);
            for (int i = 0; i < 4; ++i) value[i] = __fmul_rn(mul, (float)(signed char)(numbers >> (8 * i)));
            return;
        }
        const u32 low = word_at(chunk + quad * F::QUAD_LOW + low_word<F::LOW>(s, w, lane, row));
        u32 high = 0;
        if (F::HIGH)
            high = word_at(chunk + F::HIGH_AT + quad * F::QUAD_HIGH + high_word<F::LOW, F::HIGH>(s, lane, row));
        for (int i = 0; i < 4; ++i) {
            u32 q = (low >> low_bit<F::LOW>(s, i)) & ((1u << F::LOW) - 1u);
            if (F::HIGH)
                q |= ((high >> high_bit<F::LOW, F::HIGH>(s, w, i, row)) & ((1u << F::HIGH) - 1u)) << F::LOW;
            const int number = F::LOW == 8 ? (int)(signed char)q : (int)q - F::OFFSET;
            const float product = __fmul_rn(mul, (float)number);
            value[i] = F::HAS_ADD ? __fadd_rn(product, add) : product;
        }
    }
};
template <class F>
struct Unpack<F, false> {
    DEVICE void four(const u8* chunk, int quad, int s, int w, int lane, int row, float scale, float* value) {
        const int pieces = F::LOW / 16;
        const u8* p = chunk + (((quad * 4 + s) * 2 + w) * pieces * 32 + lane) * 16 + row * 4;
        for (int half = 0; half < 2; ++half) {
            const u32 pair = word_at(p + half * 8);
            value[half * 2] = low_half(pair);
            value[half * 2 + 1] = high_half(pair);
            if (pieces == 2) {
                const u32 rest = word_at(p + 512 + half * 8);
                value[half * 2] += low_half(rest);
                value[half * 2 + 1] += high_half(rest);
            }
        }
        if (F::HAS_SCALE)
            for (int i = 0; i < 4; ++i) value[i] *= scale;
    }
};
