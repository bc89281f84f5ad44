// Formats whose bits name numbers instead of being them. Of the structs of formats.cuh they have CODED, and
//   LOW 4  levels(word, high): four levels that the low (or high) halves of a LOW word's bytes name; packed as the others
//   LOW 0  a layout of their own, packed by pack(); words are ordered [..][lane] or [..][g], so that lanes meet different banks
// A value is mul * number.

template <class Base>
struct Coded : Base {
    static constexpr bool CODED = true, BYTES = true;
    DEVICE float add(const Scales&, int, int, int) { return 0.0f; }
};

DEVICE const u8* inside(const u8* block, int at) { return block ? block + at : nullptr; }
DEVICE u32 byte_or_zero(const u8* block, int at) { return block ? block[at] : 0u; }
DEVICE u32 word_or_zero(const u8* block, int at) { return block ? load_u32_bytes(block + at) : 0u; }
DEVICE float half_of(u32 pair, int row) { return row ? high_half(pair) : low_half(pair); }

// ---- sixteen levels ----------------------------------------------------------------------------------------------
// A, B, C, D: the levels, four in a word.
template <class Base, u32 A, u32 B, u32 C, u32 D>
struct Levels : Coded<Base> {
    DEVICE u32 levels(u32 word, int high) {
        u32 two[2];  // of both halves of two bytes
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 codes = word >> (16 * i), at = codes & 0x7777u;
            two[i] = __byte_perm(__byte_perm(A, B, at), __byte_perm(C, D, at), 0x3210u | ((codes >> 1) & 0x4444u));
        }
        return __byte_perm(two[0], two[1], high ? 0x7531 : 0x6420);
    }
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        return levels(word_at(chunk + quad * Base::QUAD_LOW + low_word<4>(s, w, lane, row)), s & 1);
    }
};
template <class Base>
struct FourBitFloats : Levels<Base, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu> {};  // twice their values
template <class Base>
struct FinerNearZero : Levels<Base, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u> {};

struct IQ4_NL : FinerNearZero<Plain<18, 4, 0, 0, false>> {};  // half d; 16 bytes as Q4_0

// Block: half d; 8 scales of 6 bits, + 32: upper pairs, low nibbles; 16 bytes per 32: low halves first, then high.
// Scales plane: [g][slot] low nibbles, then pairs, fields quad*2 + row; [g] d0 d1.
struct IQ4_XS : FinerNearZero<Blocks<256, 136, 4, 0, 1, 0, false>> {
    DEVICE u32 quant(const u8* block, int k) {
        const u32 byte = block[8 + (k >> 5) * 16 + (k & 15)];
        return (k & 16) ? byte >> 4 : byte & 15u;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u32 low = 0, high = 0;
        for (int i = 0; i < 4; ++i) {
            const u8* block = (i & 1) ? second[0] : first[0];
            const int j = (i >> 1) * 4 + t;
            if (!block) continue;
            low |= ((block[4 + (j >> 1)] >> (4 * (j & 1))) & 15u) << (4 * i);
            high |= ((load_u16(block + 2) >> (2 * j)) & 3u) << (2 * i);
        }
        u8* plane = chunk + SCALES_AT;
        ((u16*)plane)[g * 4 + t] = (u16)low;
        plane[64 + g * 4 + t] = (u8)high;
        if (t == 0) ((u32*)(plane + 96))[g] = half_pair(first[0], second[0]);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* plane = chunk + SCALES_AT;
        return {((const u16*)plane)[g * 4 + slot], plane[64 + g * 4 + slot], word_at(plane + 96 + g * 4), 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        const int i = quad * 2 + row;
        const u32 scale = ((s.a >> (4 * i)) & 15u) | (((s.b >> (2 * i)) & 3u) << 4);
        return half_of(s.c, row) * (float)((int)scale - 32);
    }
};

// Block: exponent byte; 16 bytes as Q4_0. Scales plane: [g][slot] exponents of row 0, 1. Half the scale: 2^(e - 128).
struct MXFP4 : FourBitFloats<Blocks<32, 17, 4, 0, 1, 0, false>> {
    DEVICE u32 quant(const u8* block, int k) { return k < 16 ? block[1 + k] & 15u : block[1 + (k & 15)] >> 4; }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u8* plane = chunk + SCALES_AT + (g * 4 + t) * 2;
        plane[0] = (u8)byte_or_zero(first[t], 0);
        plane[1] = (u8)byte_or_zero(second[t], 0);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {*(const u16*)(chunk + SCALES_AT + (g * 4 + slot) * 2), 0u, 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int, int row, int) {
        const u32 e = (s.a >> (8 * row)) & 255u;
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

// Block: 4 scales, unsigned floats of 4 and 3 bits (0x7f is 0; else the eighth is ignored); 8 bytes per 16: low halves first.
// Scales plane: [g][slot] four scales, row*2 + group.
struct NVFP4 : FourBitFloats<Blocks<64, 36, 4, 0, 2, 0, false>> {
    DEVICE u32 quant(const u8* block, int k) {
        const u32 byte = block[4 + (k >> 4) * 8 + (k & 7)];
        return (k & 8) ? byte >> 4 : byte & 15u;
    }
    DEVICE void pack_scales(u8* chunk, const u8* const* first, const u8* const* second, int g, int t) {
        u32 v = 0;
        for (int i = 0; i < 4; ++i)
            v |= byte_or_zero((i & 2) ? second[t >> 1] : first[t >> 1], (t & 1) * 2 + (i & 1)) << (8 * i);
        ((u32*)(chunk + SCALES_AT))[g * 4 + t] = v;
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {word_at(chunk + SCALES_AT + (g * 4 + slot) * 4), 0u, 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int, int row, int group) {
        const u32 byte = (s.a >> (8 * (row * 2 + group))) & 255u, code = byte & 127u;
        if (byte == 127u) return 0.0f;
        // Half of (1 + m / 8) * 2^(e - 7), or of m * 2^-9 where e is 0.
        return code < 8u ? small_to_float(code) * 0.0009765625f : __uint_as_float((code << 20) + (119u << 23));
    }
};

// ---- grids ---------------------------------------------------------------------------------------------------------
// GridOf<F> is written by grid_tables.py for the formats that a build names: at(i) names the values of four coordinates,
// one in each half byte; LOW and HIGH are up to eight values, sorted. Who uses a grid that was not named does not link.
extern __device__ u32 grid_of_a_format_that_was_not_named();
template <class F>
struct GridOf {
    static constexpr u32 LOW = 0, HIGH = 0;
    static constexpr bool ANY = false;
    DEVICE u32 at(int) { return grid_of_a_format_that_was_not_named(); }
    DEVICE void bring(int, int) {}
};

// Words of 8 sub-blocks and 16 rows: [quad][s][row][g].
DEVICE int word_of(int quad, int s, int row, int g) { return (((quad * 4 + s) * 2 + row) * 8 + g) * 4; }

// Bit i negates byte i, all of which are above zero.
DEVICE u32 negate(u32 bytes, u32 bits) {
    const u32 ones = (bits * 0x00204081u) & 0x01010101u;
    return (bytes ^ (ones * 255u)) + ones;
}
// Four of eight signs, kept in 7 bits: the eighth makes the number of minus signs even.
DEVICE u32 signs_of_seven(u32 seven, int half) {
    return ((seven | ((u32)(__popc(seven) & 1) << 7)) >> (4 * half)) & 15u;
}

// What all grids share.
template <class F, int BYTES, int GROUPS>
struct Grid : Coded<Blocks<256, BYTES, 0, 0, GROUPS, 0, false>> {
    DEVICE u32 points(int index) { return __byte_perm(GridOf<F>::LOW, GridOf<F>::HIGH, GridOf<F>::at(index)); }
    // Slot t's words of (quad, row): `step` bytes apart in the block.
    DEVICE void pack_words(u8* plane, const u8* first, const u8* second, int from, int step, int g, int t) {
        for (int i = 0; i < 4; ++i)
            *(u32*)(plane + word_of(i >> 1, t, i & 1, g)) = word_or_zero((i & 1) ? second : first, from + ((i >> 1) * 4 + t) * step);
    }
    // A byte of each sub-block: [slot][g] four of them, quad*2 + row.
    DEVICE void pack_bytes(u8* plane, const u8* first, const u8* second, int from, int g, int t) {
        u32 v = 0;
        for (int i = 0; i < 4; ++i) v |= byte_or_zero((i & 1) ? second : first, from + (i >> 1) * 4 + t) << (8 * i);
        *(u32*)(plane + (t * 8 + g) * 4) = v;
    }
    DEVICE u32 byte_of(const u8* plane, int quad, int slot, int row, int g) { return plane[(slot * 8 + g) * 4 + quad * 2 + row]; }
    DEVICE void pack_d(u8* plane, const u8* first, const u8* second, int g, int t) {
        if (t == 0) *(u32*)(plane + g * 4) = half_pair(first, second);
    }
    // The upper four bits of four words, one in each byte: quad*2 + row.
    DEVICE u32 top_bits(const u8* plane, int g, int slot) {
        u32 v = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) v |= (word_at(plane + word_of(i >> 1, slot, i & 1, g)) >> 28) << (8 * i);
        return v;
    }
};

// Points of four numbers. Indices: [quad][row*2 + w][lane], byte s.
template <class F, int BYTES>
struct GridOfFour : Grid<F, BYTES, 1> {
    static constexpr int SIGNS = 1024;
    DEVICE u32 index(const u8* chunk, int quad, int s, int w, int lane, int row) {
        return chunk[quad * 512 + ((row * 2 + w) * 32 + lane) * 4 + s];
    }
    DEVICE void pack_indices(u8* chunk, const u8* first, const u8* second, int lane) {
        for (int n = 0; n < 8; ++n) {  // (quad, row, w)
            u32 v = 0;
            for (int s = 0; s < 4; ++s)
                v |= byte_or_zero((n & 2) ? second : first, 2 + ((n >> 2) * 4 + s) * 8 + (n & 1) * 4 + (lane & 3)) << (8 * s);
            *(u32*)(chunk + (n >> 2) * 512 + ((n & 3) * 32 + lane) * 4) = v;
        }
    }
};

// Block: half d; 64 indices; 8 words: 4 times 7 bits of signs, scale. Chunk: indices; words; [g] d0 d1.
struct IQ3_XXS : GridOfFour<IQ3_XXS, 98> {
    static constexpr int D = 1536;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const u32 word = word_at(chunk + SIGNS + word_of(quad, s, row, lane >> 2));
        const u32 seven = (word >> (7 * (w * 2 + ((lane >> 1) & 1)))) & 127u;
        return negate(points(index(chunk, quad, s, w, lane, row)), signs_of_seven(seven, lane & 1));
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        pack_indices(chunk, first, second, lane);
        pack_words(chunk + SIGNS, first, second, 66, 4, lane >> 2, lane & 3);
        pack_d(chunk + D, first, second, lane >> 2, lane & 3);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {top_bits(chunk + SIGNS, g, slot), word_at(chunk + D + g * 4), 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        return half_of(s.b, row) * (0.5f + small_to_float((s.a >> (8 * (quad * 2 + row))) & 15u)) * 0.5f;
    }
};

// Block: half d; 64 indices; 8 bytes of their ninth bits; 32 bytes of signs; 8 scales of 4 bits.
// Chunk: indices; signs; [slot][g] ninth bits; [slot][g] scales; [g] d0 d1.
struct IQ3_S : GridOfFour<IQ3_S, 110> {
    static constexpr int NINTH = 1536, SCALES = 1664, D = 1728;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int g = lane >> 2, t = lane & 3;
        const u32 ninth = (byte_of(chunk + NINTH, quad, s, row, g) >> (w * 4 + t)) & 1u;
        const u32 signs = (word_at(chunk + SIGNS + word_of(quad, s, row, g)) >> (w * 16 + t * 4)) & 15u;
        return negate(points(index(chunk, quad, s, w, lane, row) | (ninth << 8)), signs);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        const int g = lane >> 2, t = lane & 3;
        pack_indices(chunk, first, second, lane);
        pack_words(chunk + SIGNS, first, second, 74, 4, g, t);
        pack_bytes(chunk + NINTH, first, second, 66, g, t);
        u32 v = 0;
        for (int i = 0; i < 4; ++i) {
            const int j = (i >> 1) * 4 + t;
            v |= ((byte_or_zero((i & 1) ? second : first, 106 + (j >> 1)) >> (4 * (j & 1))) & 15u) << (4 * i);
        }
        *(u16*)(chunk + SCALES + (t * 8 + g) * 2) = (u16)v;
        pack_d(chunk + D, first, second, g, t);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {*(const u16*)(chunk + SCALES + (slot * 8 + g) * 2), word_at(chunk + D + g * 4), 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        return half_of(s.b, row) * (1.0f + 2.0f * small_to_float((s.a >> (4 * (quad * 2 + row))) & 15u));
    }
};

// Points of eight numbers: lanes t and t ^ 1 share one, number w*2 + t/2 of its sub-block.
DEVICE int point_of(int lane, int w) { return w * 2 + ((lane >> 1) & 1); }

// Block: half d; per 32: 4 indices, and a word: 4 times 7 bits of signs, scale. Chunk: indices; words; [g] d0 d1.
struct IQ2_XXS : Grid<IQ2_XXS, 66, 1> {
    static constexpr int SIGNS = 512, D = 1024;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int at = word_of(quad, s, row, lane >> 2), j = point_of(lane, w);
        const u32 index = (word_at(chunk + at) >> (8 * j)) & 255u, seven = (word_at(chunk + SIGNS + at) >> (7 * j)) & 127u;
        return negate(points(index * 2 + (lane & 1)), signs_of_seven(seven, lane & 1));
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        pack_words(chunk, first, second, 2, 8, lane >> 2, lane & 3);
        pack_words(chunk + SIGNS, first, second, 6, 8, lane >> 2, lane & 3);
        pack_d(chunk + D, first, second, lane >> 2, lane & 3);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {top_bits(chunk + SIGNS, g, slot), word_at(chunk + D + g * 4), 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        return half_of(s.b, row) * (0.5f + small_to_float((s.a >> (8 * (quad * 2 + row))) & 15u)) * 0.25f;
    }
};

// Scales of 16 columns: a byte of a sub-block has those of both.
template <class F, int BYTES, int SCALES, int D>
struct GridOfSixteens : Grid<F, BYTES, 2> {
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        return {word_at(chunk + SCALES + (slot * 8 + g) * 4), word_at(chunk + D + g * 4), 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int group) {
        const u32 scale = (s.a >> (8 * (quad * 2 + row) + 4 * group)) & 15u;
        return half_of(s.b, row) * (0.5f + small_to_float(scale)) * 0.25f;
    }
};

// Block: half d; 32 numbers: index (9 bits), signs (7); 8 bytes of scales.
// Chunk: words of numbers 0, 1 of a sub-block; of numbers 2, 3; [slot][g] scales; [g] d0 d1.
struct IQ2_XS : GridOfSixteens<IQ2_XS, 74, 1024, 1152> {
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const u32 word = word_at(chunk + w * 512 + word_of(quad, s, row, lane >> 2)) >> (16 * ((lane >> 1) & 1));
        return negate(points((word & 511u) * 2 + (lane & 1)), signs_of_seven((word >> 9) & 127u, lane & 1));
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        const int g = lane >> 2, t = lane & 3;
        pack_words(chunk, first, second, 2, 8, g, t);
        pack_words(chunk + 512, first, second, 6, 8, g, t);
        pack_bytes(chunk + 1024, first, second, 66, g, t);
        pack_d(chunk + 1152, first, second, g, t);
    }
};

// Block: half d; 32 indices; 32 bytes of signs; 8 bytes of the indices' upper pairs of bits; 8 bytes of scales.
// Chunk: indices; signs; [slot][g] upper pairs; [slot][g] scales; [g] d0 d1.
struct IQ2_S : GridOfSixteens<IQ2_S, 82, 1152, 1280> {
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int g = lane >> 2, at = word_of(quad, s, row, g), j = point_of(lane, w);
        const u32 high = (byte_of(chunk + 1024, quad, s, row, g) >> (2 * j)) & 3u;
        const u32 index = ((word_at(chunk + at) >> (8 * j)) & 255u) | (high << 8);
        return negate(points(index * 2 + (lane & 1)), (word_at(chunk + 512 + at) >> (8 * j + 4 * (lane & 1))) & 15u);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        const int g = lane >> 2, t = lane & 3;
        pack_words(chunk, first, second, 2, 4, g, t);
        pack_words(chunk + 512, first, second, 34, 4, g, t);
        pack_bytes(chunk + 1024, first, second, 66, g, t);
        pack_bytes(chunk + 1152, first, second, 74, g, t);
        pack_d(chunk + 1280, first, second, g, t);
    }
};

// Points of -1, 0 and 1, each moved by 1/8 up or down: eight times that, and an eighth of the scale.
template <class F, int BYTES, int GROUPS>
struct GridOfThree : Grid<F, BYTES, GROUPS> {
    static constexpr int UPPER = 512;  // [quad][slot][g] 16 bits of rows 0 and 1
    DEVICE u32 upper(const u8* chunk, int quad, int slot, int row, int g) {
        return *(const u16*)(chunk + UPPER + ((quad * 4 + slot) * 8 + g) * 4 + row * 2);
    }
    DEVICE void pack_upper(u8* chunk, const u8* first, const u8* second, int from, int g, int t) {
        for (int quad = 0; quad < 2; ++quad) {
            const int at = from + (quad * 4 + t) * 2;
            *(u32*)(chunk + UPPER + ((quad * 4 + t) * 8 + g) * 4) = half_pair(inside(first, at), inside(second, at));
        }
    }
    DEVICE u32 moved(int index, bool down) {
        return __byte_perm(down ? 0x0007fff7u : 0x000901f9u, 0u, GridOf<F>::at(index));
    }
    DEVICE u32 low_index(const u8* chunk, int quad, int s, int row, int lane, int j) {
        return (word_at(chunk + word_of(quad, s, row, lane >> 2)) >> (8 * j)) & 255u;
    }
};

// Block: half d; 32 indices; 8 numbers: 4 times the upper 3 bits, scale (3 bits), down. Chunk: indices; numbers; [g] d0 d1.
struct IQ1_S : GridOfThree<IQ1_S, 50, 1> {
    static constexpr int D = 768;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int j = point_of(lane, w);
        const u32 more = upper(chunk, quad, s, row, lane >> 2);
        const u32 index = low_index(chunk, quad, s, row, lane, j) | (((more >> (3 * j)) & 7u) << 8);
        return moved(index * 2 + (lane & 1), more >> 15);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        pack_words(chunk, first, second, 2, 4, lane >> 2, lane & 3);
        pack_upper(chunk, first, second, 34, lane >> 2, lane & 3);
        pack_d(chunk + D, first, second, lane >> 2, lane & 3);
    }
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        const u8* at = chunk + UPPER + (slot * 8 + g) * 4;
        return {word_at(at), word_at(at + 128), word_at(chunk + D + g * 4), 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int) {
        const u32 scale = ((quad ? s.b : s.a) >> (12 + 16 * row)) & 7u;
        return half_of(s.c, row) * (2.0f * small_to_float(scale) + 1.0f) * 0.125f;
    }
};

// Block: 32 indices; 16 bytes: per index the upper 3 bits, down; 4 numbers: 4 scales of 3 bits, and 4 bits of the half d.
// Chunk: indices; [quad][slot][g] those bytes; [g][row] the numbers.
struct IQ1_M : GridOfThree<IQ1_M, 56, 2> {
    static constexpr int SCALES = 768;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int j = point_of(lane, w);
        const u32 more = (upper(chunk, quad, s, row, lane >> 2) >> (4 * j)) & 15u;
        return moved((low_index(chunk, quad, s, row, lane, j) | ((more & 7u) << 8)) * 2 + (lane & 1), more >> 3);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        const int g = lane >> 2, t = lane & 3;
        pack_words(chunk, first, second, 0, 4, g, t);
        pack_upper(chunk, first, second, 32, g, t);
        *(u32*)(chunk + SCALES + (g * 4 + t) * 4) = word_or_zero(t >= 2 ? second : first, 48 + (t & 1) * 4);
    }
    // d of both rows; scales in fields of 4 bits, quad*4 + row*2 + group.
    DEVICE Scales load(const u8* chunk, int g, int slot) {
        u32 d = 0, scales = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // (row, quad): two numbers, one of which has this slot's scales
            const u32 word = word_at(chunk + SCALES + (g * 4 + i) * 4), number = (slot & 2) ? word >> 16 : word;
            d |= (((word >> 12) & 15u) | ((word >> 24) & 0xf0u)) << (8 * i);
            const u32 two = (number >> (6 * (slot & 1))) & 63u;
            scales |= ((two & 7u) | ((two >> 3) << 4)) << (16 * (i & 1) + 8 * (i >> 1));
        }
        return {d, scales, 0u, 0u};
    }
    DEVICE float mul(const Scales& s, int quad, int row, int group) {
        const u32 scale = (s.b >> (4 * (quad * 4 + row * 2 + group))) & 7u;
        return half_of(s.a, row) * (2.0f * small_to_float(scale) + 1.0f) * 0.125f;
    }
};

// ---- trits and bits --------------------------------------------------------------------------------------------------
// Block: 48 bytes of five base-3 digits (32: elements 0-159; 16: 160-239), 4 of four (240-255), each first all first
// digits; half d. Chunk: [row*3 + word][lane]: bytes 4t of the first 16, the next, the last; [row][g] the four; [g] d0 d1.
struct TQ1_0 : Coded<Blocks<256, 54, 0, 0, 1, 0, false>> {
    static constexpr int LAST = 768, D = 832;
    DEVICE u32 numbers(const u8* chunk, int quad, int s, int w, int lane, int row) {
        const int part = quad * 4 + s, t = lane & 3;
        const bool last = part == 7 && w == 1;
        const int digit = part < 5 ? part : part < 7 ? (part - 5) * 2 + w : last ? t : 4;
        const u32 word = word_at(last ? chunk + LAST + (row * 8 + (lane >> 2)) * 4
                                      : chunk + ((row * 3 + (part < 5 ? w : 2)) * 32 + lane) * 4);
        const u32 power = digit == 0 ? 1u : digit == 1 ? 3u : digit == 2 ? 9u : digit == 3 ? 27u : 81u;
        // A byte is a fraction of 256; its digits are those behind the point. Even bytes, then odd ones, in 16 bits each.
        const u32 even = (((((word & 0x00ff00ffu) * power) & 0x00ff00ffu) * 3u) >> 8) & 0x00030003u;
        const u32 odd = ((((((word >> 8) & 0x00ff00ffu) * power) & 0x00ff00ffu) * 3u)) & 0x03000300u;
        return less_one(even | odd);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        const int g = lane >> 2, t = lane & 3;
        for (int n = 0; n < 6; ++n)
            *(u32*)(chunk + (n * 32 + lane) * 4) = word_or_zero(n < 3 ? first : second, (n % 3) * 16 + t * 4);
        if (t < 2) *(u32*)(chunk + LAST + (t * 8 + g) * 4) = word_or_zero(t ? second : first, 48);
        if (t == 0) *(u32*)(chunk + D + g * 4) = half_pair(inside(first, 52), inside(second, 52));
    }
    DEVICE Scales load(const u8* chunk, int g, int) { return {word_at(chunk + D + g * 4), 0u, 0u, 0u}; }
    DEVICE float mul(const Scales& s, int, int row, int) { return half_of(s.a, row); }
};

// Block: half d; 128 bits: d or -d. Chunk: [row][lane] bit s*2 + w of byte i; [g] d0 d1.
struct Q1_0 : Coded<Blocks<128, 18, 0, 0, 1, 0, false>> {
    static constexpr int D = 256;
    DEVICE u32 numbers(const u8* chunk, int, int s, int w, int lane, int row) {
        const u32 ones = (word_at(chunk + (row * 32 + lane) * 4) >> (s * 2 + w)) & 0x01010101u;
        return ones | ((ones ^ 0x01010101u) * 255u);
    }
    DEVICE void pack(u8* chunk, const u8* first, const u8* second, int lane) {
        for (int row = 0; row < 2; ++row) {
            const u8* block = row ? second : first;
            u32 v = 0;
            for (int n = 0; n < 32; ++n) {  // (s, w, i)
                const int k = (n >> 2) * 16 + (lane & 3) * 4 + (n & 3);
                v |= ((byte_or_zero(block, 2 + (k >> 3)) >> (k & 7)) & 1u) << ((n & 3) * 8 + (n >> 2));
            }
            *(u32*)(chunk + (row * 32 + lane) * 4) = v;
        }
        if ((lane & 3) == 0) *(u32*)(chunk + D + (lane >> 2) * 4) = half_pair(first, second);
    }
    DEVICE Scales load(const u8* chunk, int g, int) { return {word_at(chunk + D + g * 4), 0u, 0u, 0u}; }
    DEVICE float mul(const Scales& s, int, int row, int) { return half_of(s.a, row); }
};
