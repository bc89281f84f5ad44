// What decode_gemm.cu needs of Hopper: wgmma with the weights in registers, barriers, bulk copies, cluster memory.
//
// NT groups of 8 sequences. Operands of the activations are kept in shared memory as core matrices of 8 sequences x 8 columns
// (128 bytes), [group of 8 sequences][first, second 8 columns] of a step of 16 columns.

constexpr int STEP_BYTES = NT * 256, SUMS_AT = 16 * STEP_BYTES, FLOATS_AT = 17 * STEP_BYTES;
constexpr int X_BYTES = operand_bytes(NT);  // of 256 columns
typedef float Sums[NT * 4];

// Matrix descriptor: address (18 bits of it: above them is the block's rank in its cluster), 128 bytes from one core matrix
// to the next along columns, 256 along sequences, no swizzle.
DEVICE u64 operand_at(u32 address) { return (u64)((address & 0x3ffffu) >> 4) | (8ull << 16) | (16ull << 32); }

// d (+)= weights (16 rows of each warp, 16 columns) * activations. keep 0: overwrites d.
DEVICE void wgmma(Sums& d, const u32* a, u64 b, int keep) { product_of_registers<NT * 8, 0>(d, a, b, keep); }

// Keeps the compiler from moving uses of what wgmma reads or writes over a fence or a wait.
DEVICE void keep_order(Sums& d) {
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) asm volatile("" : "+f"(d[i]));
}
DEVICE void keep_order(u32 (&a)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+r"(a[i]));
}

// ---- the same with the instructions of single warps, faster for few sequences --------------------------------
DEVICE void multiply(float* d, const u32* a, u32 b0, u32 b1) { mma16(d, a[0], a[1], a[2], a[3], b0, b1); }

// d += weights (16 rows, 16 columns) * activations; address: of this lane.
DEVICE void add_step(Sums& d, const u32* a, u32 address) {
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        u32 b[4];
        load_matrix4(b, address + j * 256);  // with one group of sequences, the second half is not looked at
        multiply(d + j * 4, a, b[0], b[1]);
        if (NT > 1) multiply(d + (NT > 1 ? j * 4 + 4 : 0), a, b[2], b[3]);
    }
}
DEVICE void add_two_steps(Sums& d, const u32 (&a)[8], u32 address) {
    if (NT > 1) {
        add_step(d, a, address);
        add_step(d, a + 4, address + STEP_BYTES);
    } else {
        u32 b[4];
        load_matrix4(b, address);
        multiply(d, a, b[0], b[1]);
        multiply(d, a + 4, b[2], b[3]);
    }
}
