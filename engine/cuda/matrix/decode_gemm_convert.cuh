// Activations as decode_gemm.cu multiplies them: halves times a power of two per sequence and 256 columns, mostly 1.
//
// An operand of 256 columns is 16 steps of 16 columns, then the sums of 32 inputs; each of those is nt groups of 8 sequences
// of two core matrices of 8 sequences x 8 halves. A step: its even columns, its odd ones. Sums: columns 2s + quad for
// sub-block s of that quad, as halves, then what those leave over. They are sums of the halves, not of x: rounding x moves no
// minimum. Behind them, float32 per sequence: what undoes the power of two, and the sum of the squares of x.

DEVICE constexpr int operand_bytes(int nt) { return nt * (17 * 256 + 64); }

// Four columns from k on; past the end zeros. wide: all of them or none are inside, and aligned.
DEVICE float4 four_of(const float* row, int k, int columns, bool wide) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (wide) {
        if (k < columns) v = __ldcg((const float4*)(row + k));
    } else {
        if (k < columns) v.x = __ldcg(row + k);
        if (k + 1 < columns) v.y = __ldcg(row + k + 1);
        if (k + 2 < columns) v.z = __ldcg(row + k + 2);
        if (k + 3 < columns) v.w = __ldcg(row + k + 3);
    }
    return v;
}

// One warp: 256 columns of sequence b, v[i] columns 128 i + 4 lane .., times the norm's weight where there is one.
DEVICE void convert(const float4 (&x)[2], const float4 (&weight)[2], bool norm, int b, int nt, int lane, u8* out) {
    float4 v[2] = {x[0], x[1]};
    float square = 0.0f, largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        square = fmaf(v[i].x, v[i].x, square), square = fmaf(v[i].y, v[i].y, square);
        square = fmaf(v[i].z, v[i].z, square), square = fmaf(v[i].w, v[i].w, square);
        if (norm) v[i].x *= weight[i].x, v[i].y *= weight[i].y, v[i].z *= weight[i].z, v[i].w *= weight[i].w;
        largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w))));
    }
    square = warp_sum(square);
    largest = __uint_as_float(__reduce_max_sync(FULL_MASK, __float_as_uint(largest)));
    // 2^e with 2^e * largest in [2^9, 2^10): sums of 32 are halves too. Inputs of a usual size, [2^-6, 2^10), stay as they
    // are, so that nothing is to be undone: what the smallest lose, 2^-25, is little beside the rounding of the largest.
    const u32 own = __float_as_uint(largest) >> 23;
    const u32 exponent = own == 0 || (own >= 121 && own <= 136) ? 136u : min(max(own, 20u), 240u);
    const float scale = __uint_as_float((263u - exponent) << 23);
    u8* const place = out + (b >> 3) * 256 + (b & 7) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float third = v[i].z * scale;
        const u32 even = two_halves(v[i].x * scale, third);
        const float fourth = v[i].w * scale;
        const u32 odd = two_halves(v[i].y * scale, fourth);
        u8* const at = place + (i * 8 + (lane >> 2)) * nt * 256 + (lane & 3) * 4;
        *(u32*)at = even;
        *(u32*)(at + 128) = odd;
        float sum = (low_half(even) + low_half(odd)) + (high_half(even) + high_half(odd));
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        sum += __shfl_xor_sync(FULL_MASK, sum, 4);
        if ((lane & 7) == 0) {
            const u16 high = float_to_half(sum);
            u16* const sums = (u16*)(place + 16 * nt * 256) + (lane >> 3) * 2 + i;
            sums[0] = high;
            sums[64] = float_to_half(sum - half_to_float(high));
        }
    }
    if (lane == 0) {
        float* const floats = (float*)(out + 17 * nt * 256) + b;
        floats[0] = __uint_as_float((exponent - 9u) << 23);
        floats[nt * 8] = square;
    }
}
