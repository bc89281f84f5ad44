// Pairs of halfs in a register, and what both ways from packed weights to halfs share.
//
// There are two ways, because they round differently and each suits its kernel:
// - formats_half.cuh (decode_gemm.cu): quants times integer scales, exact, with super-block scales and minimums applied to
//   sums in float32. A chunk is unpacked once for at most 64 rows, so it has to be cheap.
// - gemm_unpack.cuh (gemm.cu, moe_rows.cu): quants times the whole scale, rounded to a half. The sums of hundreds of
//   tokens stay in the tensor cores from the first column to the last and cannot be corrected in between. moe_rows.cu has
//   few rows and takes quants without a scale where that is possible (moe_rows_columns.cuh).
// Neither can take over the other's format code without changing results. Both take layouts, scales and signed bytes from
// the format's struct (formats.cuh, formats_coded.cuh), so a new format is written there alone.

DEVICE u32 add_halves(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 mul_halves(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// (v & mask) | magic in one instruction, which takes one constant: hidden() or hidden_constant() keep the other in a register.
DEVICE u32 and_or(u32 v, u32 mask, u32 magic) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(magic));
    return r;
}
DEVICE u32 hidden(u32 v) {
    u32 r;
    asm("mov.b32 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
DEVICE u32 hidden_constant(u32 v) {  // made where it is written, once, and not again beside every use
    u32 r;
    asm volatile("mov.b32 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
// One half of a pair in both places, written so that it becomes part of the instruction that uses it.
DEVICE u32 twice(u32 pair, int high) {
    u32 r;
    if (high)
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {h, h};\n}" : "=r"(r) : "r"(pair));
    else
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {l, l};\n}" : "=r"(r) : "r"(pair));
    return r;
}

// ---- without instructions of their own -------------------------------------------------------------------------
constexpr int GAIN = 16;  // of scales that are rounded to halfs: small ones stay above the halfs' denormals

constexpr u32 same_halves(u32 half) { return half | (half << 16); }

// 16 columns of a tile of halfs as a fragment: the even columns 4t, 4t + 2 of rows g and g + 8, then the odd ones.
DEVICE void fragment_of(const uint4& v, u32* a) {
    a[0] = __byte_perm(v.x, v.z, 0x5410), a[1] = __byte_perm(v.y, v.w, 0x5410);
    a[2] = __byte_perm(v.x, v.z, 0x7632), a[3] = __byte_perm(v.y, v.w, 0x7632);
}
