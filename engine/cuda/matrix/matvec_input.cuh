// Activations as the bytes that matvec.cu and matvec_operand.cu multiply: 16-bit fixed point per 32 columns, in two bytes.

// Largest of the eight lanes that hold a sub-block.
DEVICE float largest_of_eight(float v) {
    v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, 1));
    v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, 2));
    return fmaxf(v, __shfl_xor_sync(FULL_MASK, v, 4));
}

// The high and the low bytes of a lane's four columns, what undoes the scaling of its 32, and the sum of its 16.
DEVICE float split_four(float4 y, u32& high, u32& low, float& undo) {
    const float largest = largest_of_eight(fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w))));
    // Integers in the low bits of floats, plus 128: high byte, and low byte off by 128.
    const float bounded = fmaxf(largest, 1e-30f), up = __fdividef(32600.0f, bounded);
    undo = bounded * (1.0f / 32600.0f);
    const float shift = 12582912.0f + 128.0f;
    const u32 i0 = __float_as_uint(fmaf(y.x, up, shift)), i1 = __float_as_uint(fmaf(y.y, up, shift));
    const u32 i2 = __float_as_uint(fmaf(y.z, up, shift)), i3 = __float_as_uint(fmaf(y.w, up, shift));
    const u32 a01 = __byte_perm(i0, i1, 0x5140), a23 = __byte_perm(i2, i3, 0x5140);
    high = __byte_perm(a01, a23, 0x7632), low = __byte_perm(a01, a23, 0x5410) ^ 0x80808080u;
    int sum = __dp4a((int)high, 0x01010101, 0) * 256 + __dp4a((int)low, 0x01010101, 0);
    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
    return (float)sum * undo;
}
