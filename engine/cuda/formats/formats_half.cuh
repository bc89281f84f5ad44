// Packed weights (formats.cuh) as float16 operands of tensor cores, for kernels that multiply many rows.
//
// A fragment is the A operand of 16 rows x 16 columns: a[0] a[1] rows g and g + 8 of the even columns 4t and 4t + 2 of a
// group, a[2] a[3] of the odd ones 4t + 1 and 4t + 3. The B operand must have its columns in the same order: in every
// group of 16 first the even columns, then the odd ones.
//
// Formats with super-blocks: quant times integer scale, exact in a half but for Q6_K's products beyond 2048 (2^-12).
// The quant's bits alone are a subnormal half, q * 2^(place - 24): no conversion, one multiplication by the scale times
// 2^(5 - place) makes q * scale * 2^-19. post() undoes that and applies d in float32. Minimums are a product of their own,
// with the sums of 32 inputs, see minimums().
// Plain formats: quant times scale (plus minimum), rounded to a half. F16 and BF16: as they are stored. All others: number times
// a scale rounded to a half, times GAIN, which post() takes back. Needs half_pairs.cuh, which says why there is a second way.

constexpr int POST_BITS = 19;

// ---- quants of sub-block s of a quad in the low bits of halves -------------------------------------------------
template <class F>
DEVICE int half_place(int s) {
    return F::LOW == 4 ? (s & 1) * 4 : F::LOW == 2 ? s * 2 : 0;
}

// Every format has a Packed: what load() brings of a sub-block, for fragments() to unpack later. keep_shared(): what the
// sub-block before it brought as well.
struct Quants {
    uint4 low;
    u32 high[2];
};
template <class F>
DEVICE Quants load_quants(const u8* chunk, int quad, int s, int lane) {
    Quants q = {((const uint4*)(chunk + quad * F::QUAD_LOW))[(F::LOW == 4 ? (s >> 1) * 32 : F::LOW == 8 ? s * 32 : 0) + lane], {}};
    const u8* const plane = chunk + F::HIGH_AT + quad * F::QUAD_HIGH;
    if (F::HIGH == 2) {
        const uint2 h = *(const uint2*)(plane + lane * 16 + (s >> 1) * 8);
        q.high[0] = h.x, q.high[1] = h.y;
    } else if (F::HIGH == 1 && F::LOW == 4) {
        q.high[0] = q.high[1] = word_at(plane + lane * 8 + (s >> 1) * 4);
    } else if (F::HIGH == 1) {
        const uint2 h = *(const uint2*)(plane + lane * 8);
        q.high[0] = h.x, q.high[1] = h.y;
    }
    return q;
}

// Sub-block s has quants in the same words as the one before it: they need not be read again.
template <class F>
DEVICE bool shares_words(int s) {
    return F::LOW == 4 ? s % 2 != 0 : F::LOW == 2 ? s % 4 != 0 : false;
}

// f[w * 4 ..]: fragments, each quant shifted up by half_place.
template <class F>
DEVICE void quant_halves(const Quants& q, int s, u32 (&f)[8]) {
    const u32 words[4] = {q.low.x, q.low.y, q.low.z, q.low.w};
    const int at = half_place<F>(s);
    const u32 mask = same_halves(((1u << F::LOW) - 1u) << at);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const int row = n & 1, w = n >> 1;
        u32 even = words[row * 2 + w] & mask, odd = (words[row * 2 + w] >> 8) & mask;
        if (F::HIGH) {
            const u32 high_mask = same_halves(((1u << F::HIGH) - 1u) << (at + F::LOW)), h = q.high[row];
            const int shift = high_in_byte<F::LOW, F::HIGH>(s, w, row) - (at + F::LOW);
            even |= (shift > 0 ? h >> shift : h << -shift) & high_mask;
            odd |= (shift + 8 > 0 ? h >> (shift + 8) : h << -(shift + 8)) & high_mask;
        }
        f[w * 4 + row] = even;
        f[w * 4 + 2 + row] = odd;
    }
}

// ---- formats with super-blocks ---------------------------------------------------------------------------------
// Integer scales of rows g (low half) and g + 8 (high half), not negative: BIAS is subtracted.
template <class F>
struct Fields;
struct SixBitFields {  // 24 bits per quad: four fields of 6
    DEVICE u32 load(const u8* plane, int quad, int s, int g) {
        const u32 low = ((const u32*)plane)[g * 4 + s], high = ((const u16*)(plane + 128))[g * 4 + s];
        return quad ? __funnelshift_r(low, high, 24) : low;
    }
    DEVICE u32 get(u32 fields, int field, u32 magic) {
        const u32 v = fields >> (field * 6);
        return and_or(v << 4, 63u << 16, and_or(v, 63u, hidden(same_halves(magic))));
    }
};
struct ByteFields {  // [quad][g][slot] bytes (row, group)
    DEVICE u32 load(const u8* plane, int quad, int s, int g) { return ((const u32*)plane)[quad * 32 + g * 4 + s]; }
    DEVICE u32 get(u32 fields, int field, u32 magic) {  // whose low byte is 0
        return __byte_perm(fields, magic >> 8, field ? 0x4341 : 0x4240);
    }
};
template <> struct Fields<Q4_K> : SixBitFields { static constexpr int BIAS = 0; };
template <> struct Fields<Q5_K> : SixBitFields { static constexpr int BIAS = 0; };
template <> struct Fields<Q3_K> : SixBitFields { static constexpr int BIAS = 32; };
template <> struct Fields<Q6_K> : ByteFields { static constexpr int BIAS = 128; };

template <class F, bool SUPER, bool SCALED>
struct HalfTile;

template <class F>
struct HalfTile<F, true, true> {
    static constexpr bool MINIMUMS = F::HAS_ADD;

    struct Packed {
        Quants quants;
        u32 fields;
    };
    DEVICE Packed load(const u8* chunk, int quad, int s, int lane) {
        return {load_quants<F>(chunk, quad, s, lane), Fields<F>::load(chunk + F::SCALES_AT, quad, s, lane >> 2)};
    }
    DEVICE void keep_shared(Packed& packed, const Packed& before, int s) {
        if (shares_words<F>(s)) packed.quants = before.quants;
    }
    DEVICE void fragments(const Packed& packed, int s, u32 (&f)[8]) {
        quant_halves<F>(packed.quants, s, f);
#pragma unroll
        for (int group = 0; group < F::GROUPS; ++group) {
            // 2^(15 - at) with a unit in the last place of 2^(5 - at)
            const int at = half_place<F>(s);
            const u32 minus = same_halves(0x8000u | (0x7800u - at * 0x400u + Fields<F>::BIAS));
            const u32 scale = add_halves(Fields<F>::get(packed.fields, group, 0x7800u - at * 0x400u), minus);
            // OFFSET * scale * 2^-19 = scale * 2^(5 - at) * OFFSET * 2^(at - 24): a subnormal factor
            const u32 offset = F::OFFSET ? mul_halves(scale, same_halves(0x8000u | ((u32)F::OFFSET << at))) : 0u;
#pragma unroll
            for (int w = group; w < (F::GROUPS == 1 ? 2 : group + 1); ++w)
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    u32& q = f[w * 4 + n];
                    q = F::OFFSET ? fma_halves(q, twice(scale, n & 1), twice(offset, n & 1)) : mul_halves(q, twice(scale, n & 1));
                }
        }
    }
    // What the products of this chunk are to be multiplied by, rows g and g + 8.
    DEVICE float2 post(const u8* chunk, int g) {
        const float up = (float)(1 << POST_BITS);
        if (F::HAS_ADD) {
            const uint2 v = *(const uint2*)(chunk + F::SCALES_AT + 192 + g * 8);
            return make_float2(low_half(v.x) * up, low_half(v.y) * up);
        }
        const u32 v = word_at(chunk + F::SCALES_AT + (F::GROUPS == 2 && F::LOW == 4 ? 256 : 192) + g * 4);
        return make_float2(low_half(v) * up, high_half(v) * up);
    }
    // Fragment of the minimums, integers: columns 2t, 2t + 1 are sub-block t of quad 0 and 1, to meet the sums of 32 inputs;
    // the same again in columns 8.., to meet what halves of the sums leave over. Returns their factors, rows g and g + 8.
    DEVICE float2 minimums(const u8* chunk, int lane, u32 (&a)[4]) {
        const Scales s = F::load(chunk, lane >> 2, lane & 3);
        const u32 next = __funnelshift_r(s.a, s.b, 24);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int at = 6 + row * 12;
            const u32 pair = ((s.a >> at) & 63u) | (((next >> at) & 63u) << 16);
            a[row] = a[2 + row] = add_halves(pair | 0x64006400u, 0xe400e400u);
        }
        return make_float2(-high_half(s.c), -high_half(s.d));
    }
};

// ---- formats with a half scale per 32 --------------------------------------------------------------------------
template <class F>
struct HalfTile<F, false, true> {
    static constexpr bool MINIMUMS = false;

    struct Packed {
        Quants quants;
        u32 scale, minimum;
    };
    DEVICE Packed load(const u8* chunk, int quad, int s, int lane) {
        const u32* const plane = (const u32*)(chunk + F::SCALES_AT) + (lane >> 2) * 4 + s;
        return {load_quants<F>(chunk, quad, s, lane), plane[0], F::HAS_ADD ? plane[32] : 0u};
    }
    DEVICE void keep_shared(Packed& packed, const Packed& before, int s) {
        if (shares_words<F>(s)) packed.quants = before.quants;
    }
    DEVICE void fragments(const Packed& packed, int s, u32 (&f)[8]) {
        if (F::LOW == 8) {
            const uint4 v = packed.quants.low;
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int row = n & 1, w = n >> 1;
                const u32 biased = words[row * 2 + w] ^ 0x80808080u;  // 1024 + 128 + q
                f[w * 4 + row] = add_halves(__byte_perm(biased, 0x64646464u, 0x4240), 0xe480e480u);
                f[w * 4 + 2 + row] = add_halves(__byte_perm(biased, 0x64646464u, 0x4341), 0xe480e480u);
            }
        } else {
            quant_halves<F>(packed.quants, s, f);
            // (1024 + q * 2^at) * 2^-at - 1024 * 2^-at - OFFSET, exact
            const bool shifted = s & 1;
            const u32 minus = same_halves(shifted ? 0xd400u + F::OFFSET * 16u : 0xe400u + F::OFFSET);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                f[i] = shifted ? fma_halves(f[i] | 0x64006400u, 0x2c002c00u, minus) : add_halves(f[i] | 0x64006400u, minus);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            f[i] = F::HAS_ADD ? fma_halves(f[i], twice(packed.scale, i & 1), twice(packed.minimum, i & 1))
                              : mul_halves(f[i], twice(packed.scale, i & 1));
    }
    DEVICE float2 post(const u8*, int) { return make_float2(1.0f, 1.0f); }
    DEVICE float2 minimums(const u8*, int, u32 (&)[4]) { return make_float2(0.0f, 0.0f); }
};

// ---- F16 and BF16 ----------------------------------------------------------------------------------------------
template <class F>
struct HalfTile<F, false, false> {
    static constexpr bool MINIMUMS = false;

    struct Packed {
        uint4 groups[2];
    };
    DEVICE Packed load(const u8* chunk, int, int s, int lane) {
        const uint4* const at = (const uint4*)chunk + s * 64 + lane;
        return {{at[0], at[32]}};
    }
    DEVICE void keep_shared(Packed&, const Packed&, int) {}
    DEVICE void fragments(const Packed& packed, int, u32 (&f)[8]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) fragment_of(packed.groups[i], f + i * 4);
    }
    DEVICE float2 post(const u8*, int) { return make_float2(1.0f, 1.0f); }
    DEVICE float2 minimums(const u8*, int, u32 (&)[4]) { return make_float2(0.0f, 0.0f); }
};

// ---- all others, through signed bytes --------------------------------------------------------------------------
template <class F>
struct ByteTile {
    static constexpr bool MINIMUMS = false;

    struct Packed {
        u32 numbers[4], factors[4];  // [row * 2 + w]
    };
    DEVICE Packed load(const u8* chunk, int quad, int s, int lane) {
        Packed packed;
        if constexpr (F::LOW == 4) {
            const uint4 v = ((const uint4*)(chunk + quad * F::QUAD_LOW))[(s >> 1) * 32 + lane];
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int n = 0; n < 4; ++n) packed.numbers[n] = F::levels(words[n], s & 1);
        } else {
#pragma unroll
            for (int n = 0; n < 4; ++n) packed.numbers[n] = F::numbers(chunk, quad, s, n & 1, lane, n >> 1);
        }
        const Scales scales = F::load(chunk, lane >> 2, s);
#pragma unroll
        for (int n = 0; n < 4; ++n)
            packed.factors[n] = same_halves(float_to_half(F::mul(scales, quad, n >> 1, n & 1) * GAIN));
        return packed;
    }
    DEVICE void keep_shared(Packed&, const Packed&, int) {}
    DEVICE void fragments(const Packed& packed, int, u32 (&f)[8]) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int row = n & 1, w = n >> 1;
            const u32 factor = packed.factors[row * 2 + w];
            const u32 biased = packed.numbers[row * 2 + w] ^ 0x80808080u;  // 1024 + 128 + number
            const u32 even = add_halves(__byte_perm(biased, 0x64646464u, 0x4240), 0xe480e480u);
            const u32 odd = add_halves(__byte_perm(biased, 0x64646464u, 0x4341), 0xe480e480u);
            f[w * 4 + row] = mul_halves(even, factor);
            f[w * 4 + 2 + row] = mul_halves(odd, factor);
        }
    }
    DEVICE float2 post(const u8*, int) { return make_float2(1.0f / GAIN, 1.0f / GAIN); }
    DEVICE float2 minimums(const u8*, int, u32 (&)[4]) { return make_float2(0.0f, 0.0f); }
};

template <bool BYTES, class F>
struct ChosenTile : HalfTile<F, F::BLOCK == 256, F::SCALED> {};
template <class F>
struct ChosenTile<true, F> : ByteTile<F> {};
template <class F>
struct HalfWeights : ChosenTile<F::BYTES, F> {};
