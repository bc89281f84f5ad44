// The input of a product of two to four sequences as matvec.cu multiplies it, made once for all blocks of that product.
//
// Columns belong to the warps of a tile there (members; their ranges in every slab are the same here). A warp for every fourth
// 128 columns of a member and a sequence, because that is how squares are added up: grid (4 members, slabs; with a norm 1).
// Layout: of every 128 columns the pieces, [2][lane][2] of 8 bytes; behind those of all columns the floats, [sub-block][4]
// of four: what undoes the scaling, the sum of 32 inputs, of the first and of the last 16; then sums of squares,
// [member][sequence][4].

constexpr int SLAB = 4096;

extern "C" __global__ void __launch_bounds__(128, 16)
    matvec_operand(const float* x, int x_stride, const float* norm, int columns, int unit, int split, int batch, u8* out) {
    const int lane = threadIdx.x & 31, b = threadIdx.x >> 5, member = blockIdx.x >> 2, rest = blockIdx.x & 3;
    pdl_launch();
    const int all_quads = (columns + 127) / 128, units = (columns + unit - 1) / unit, slab_units = SLAB / unit;
    const int slabs = (columns + SLAB - 1) / SLAB, to_quads = unit / 128;
    const float* const row = x + (i64)b * x_stride;
    const bool wide = ((columns | x_stride) & 3) == 0 && (((u64)x | (u64)norm) & 15) == 0;
    auto four_of = [&](const float* from, int k) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (wide) {
            if (k < columns) v = __ldcg((const float4*)(from + k));
        } else {
            if (k < columns) v.x = __ldcg(from + k);
            if (k + 1 < columns) v.y = __ldcg(from + k + 1);
            if (k + 2 < columns) v.z = __ldcg(from + k + 2);
            if (k + 3 < columns) v.w = __ldcg(from + k + 3);
        }
        return v;
    };
    const int s = lane >> 3, half = (lane >> 2) & 1, t = lane & 3;
    u8* const pieces = out + ((s >> 1) * 32 + b * 8 + t) * 16 + (s & 1) * 8 + half * 4;
    float4* const floats = (float4*)(out + all_quads * 1024) + s * 4 + b;
    float squares = 0.0f;
    bool waits = true;
    const int last = norm ? slabs : blockIdx.y + 1;
    for (int slab = blockIdx.y; slab < last; ++slab) {
        const int here = min(slab_units, units - slab * slab_units), first = slab * slab_units;
        const int begin = (first + member * here / split) * to_quads;
        const int end = min((first + (member + 1) * here / split) * to_quads, all_quads);
        float square = 0.0f;
        for (int quad = begin + rest; quad < end; quad += 4) {
            float4 weight = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
            if (norm) weight = four_of(norm, quad * 128 + lane * 4);
            if (waits) pdl_wait(), waits = false;
            if (b >= batch) return;
            float4 y = four_of(row, quad * 128 + lane * 4);
            square = fmaf(y.x, y.x, square), square = fmaf(y.y, y.y, square);
            square = fmaf(y.z, y.z, square), square = fmaf(y.w, y.w, square);
            if (norm) y.x *= weight.x, y.y *= weight.y, y.z *= weight.z, y.w *= weight.w;
            u32 high, low;
            float undo;
            const float own = split_four(y, high, low, undo), other = __shfl_xor_sync(FULL_MASK, own, 4);
            *(u32*)(pieces + quad * 1024) = high;
            *(u32*)(pieces + quad * 1024 + 64) = low;
            if ((lane & 7) == 0) floats[quad * 16] = make_float4(undo, own + other, own, other);
        }
        if (norm) squares += warp_sum(square);
    }
    if (waits) pdl_wait();
    if (norm && lane == 0 && b < batch)
        ((float*)(out + all_quads * 1280))[(member * 4 + b) * 4 + rest] = squares;
}
