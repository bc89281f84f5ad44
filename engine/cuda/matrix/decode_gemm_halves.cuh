// Operands of 256 columns from clusters that have 128 outputs each: two of them leave a half.
//
// The factor of a sequence's 256 columns depends on the largest of both halves, and is nearly always 1 (convert()). So a cluster
// writes its half for the factor 1, and tells the other one the exponent of its largest output, in a word of every sequence
// and 256 columns. The one that comes second knows both. Where the factor is another one it waits until the first one's
// outputs are in memory, and converts all 256 columns from there. So the bits are those of convert(), whatever the order of
// the clusters, and nothing is waited for otherwise. Words are zero between launches.
//
// The sum of the squares, which only a norm reads, is 0 where the factor is 1.

constexpr int WARP_SEQUENCES = (NT * 8 + CLUSTER * TILES - 1) / (CLUSTER * TILES);  // that a warp finishes
constexpr int MOST_SEQUENCES = 64;                                                  // words of 256 columns
constexpr int ARRIVED = 1 << 8, STORED = 1 << 16;                                   // beside a word's exponents

DEVICE int add_to_word(int* word, int n) {
    int old;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(n) : "memory");
    return old;
}
DEVICE void add_to_word_release(int* word, int n) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(word), "r"(n) : "memory");
}
DEVICE int load_word_acquire(const int* word) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");
    return v;
}

// Whether convert() keeps 256 columns as they are; own: biased exponent of the largest.
DEVICE bool stay_as_they_are(u32 own) { return own == 0 || (own >= 121 && own <= 136); }

// One warp: columns 4 lane .. of a half of 256, as halves, and the sums of 32 of them: what convert() does where the factor is
// 1. One function of both would change the code that the compiler makes of convert().
DEVICE void convert_half(const float4& v, int half, int lane, u8* place) {
    const u32 even = two_halves(v.x, v.z), odd = two_halves(v.y, v.w);
    u8* const at = place + (half * 8 + (lane >> 2)) * STEP_BYTES + (lane & 3) * 4;
    *(u32*)at = even;
    *(u32*)(at + 128) = odd;
    float sum = (low_half(even) + low_half(odd)) + (high_half(even) + high_half(odd));
    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
    sum += __shfl_xor_sync(FULL_MASK, sum, 4);
    if ((lane & 7) == 0) {
        const u16 high = float_to_half(sum);
        u16* const sums = (u16*)(place + SUMS_AT) + (lane >> 3) * 2 + half;
        sums[0] = high;
        sums[64] = float_to_half(sum - half_to_float(high));
    }
}

DEVICE u32 exponent_of_largest(const float4& v) {
    const float largest = fmaxf(0.0f, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    return __reduce_max_sync(FULL_MASK, __float_as_uint(largest)) >> 23;
}

// One warp: v[k] are outputs 4 lane .. of this half of sequence first + k * step; past the last column they are zeros.
// out: row 0 of these 256 columns, `left` of which there are; operand, words: of these 256 columns.
DEVICE void leave_halves(const float4 (&v)[WARP_SEQUENCES], int first, int step, int batch, int half, int lane, float* out,
                         int out_stride, int left, u8* operand, int* words) {
    const bool wide = ((out_stride | (int)((u64)out >> 2)) & 3) == 0;
    const int column = half * 128 + lane * 4, own_sequence = first + lane * step;
    const bool tells = lane < WARP_SEQUENCES && own_sequence < batch;
    u32 own = 0;
#pragma unroll
    for (int k = 0; k < WARP_SEQUENCES; ++k) {
        const u32 exponent = exponent_of_largest(v[k]);
        if (lane == k) own = exponent;
    }
    int before = 0;  // on its way while everything is stored
    if (tells) before = add_to_word(words + own_sequence, ARRIVED + (int)own);
#pragma unroll
    for (int k = 0; k < WARP_SEQUENCES; ++k) {
        const int b = first + k * step;
        if (b >= batch) break;
        float* const to = out + (i64)b * out_stride + column;
        if (wide && column + 4 <= left) {
            *(float4*)to = v[k];
        } else {
            if (column < left) to[0] = v[k].x;
            if (column + 1 < left) to[1] = v[k].y;
            if (column + 2 < left) to[2] = v[k].z;
            if (column + 3 < left) to[3] = v[k].w;
        }
        convert_half(v[k], half, lane, operand + (b >> 3) * 256 + (b & 7) * 16);
        if (half == 0 && lane == 0) {
            float* const floats = (float*)(operand + FLOATS_AT) + b;
            floats[0] = 1.0f, floats[NT * 8] = 0.0f;
        }
    }
    __syncwarp();
    bool again = false;
    if (tells && before == 0) add_to_word_release(words + own_sequence, STORED);
    __syncwarp();  // no warp waits for another before it has let go all that may wait for it
    if (tells && before != 0) {
        const int other = before & 255;
        again = !stay_as_they_are(max(own, (u32)other));
        while (again && !(load_word_acquire(words + own_sequence) & STORED)) {
        }
        add_to_word(words + own_sequence, -(2 * ARRIVED + (int)own + other + STORED));
    }
    for (u32 others = __ballot_sync(FULL_MASK, again); others; others &= others - 1) {
        const int b = first + (__ffs((int)others) - 1) * step;
        float4 both[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) both[i] = four_of(out + (i64)b * out_stride, i * 128 + lane * 4, left, wide && (left & 3) == 0);
        convert(both, both, false, b, NT, lane, operand);
    }
}
