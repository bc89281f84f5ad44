// Bytes of a cache of 8 bits (cached_rows.cuh) as pairs of float16 that tensor cores multiply. Needs half_pairs.cuh.

// Two of a word's four bytes, the lower or the upper ones, as q: 1024 + byte is a float16, and so is what it is less 1152.
DEVICE u32 quants_of(u32 word, int upper) {
    return add_halves(__byte_perm(word, 0x64646464u, upper ? 0x4342 : 0x4140), 0xe480e480u);
}

// The same bytes as they are, times BYTE_UNIT: the smallest float16s, which tensor cores multiply exactly as any others.
#define BYTE_UNIT 5.9604644775390625e-8f  // 2^-24
DEVICE u32 bytes_of(u32 word, int upper) { return __byte_perm(word, 0, upper ? 0x4342 : 0x4140); }

// A scale in both places of a pair.
DEVICE u32 scale_pair(u16 scale) { return twice(scale, 0); }

// Eight neighbours of a row as float16: q times scale, rounded.
DEVICE uint4 numbers_of(uint2 bytes, u16 scale) {
    const u32 s = scale_pair(scale);
    return make_uint4(mul_halves(quants_of(bytes.x, 0), s), mul_halves(quants_of(bytes.x, 1), s),
                      mul_halves(quants_of(bytes.y, 0), s), mul_halves(quants_of(bytes.y, 1), s));
}
