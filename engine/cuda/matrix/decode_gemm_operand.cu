// The operands of many sequences (decode_gemm_convert.cuh), made once for all blocks of a product. One warp per 256 columns of a
// sequence; grid (256 columns, groups of 8 sequences) of 8 warps.

extern "C" __global__ void __launch_bounds__(256)
    batch_operand(const float* x, int x_stride, const float* norm, int columns, int batch, int nt, u8* out) {
    const int lane = threadIdx.x & 31, b = blockIdx.y * 8 + (threadIdx.x >> 5), k = blockIdx.x * 256 + lane * 4;
    const bool wide = ((columns | x_stride) & 3) == 0 && (((u64)x | (u64)norm) & 15) == 0;
    pdl_launch();
    float4 v[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (norm) weight[i] = four_of(norm, k + i * 128, columns, wide);
    pdl_wait();
    if (b >= batch) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = four_of(x + (i64)b * x_stride, k + i * 128, columns, wide);
    convert(v, weight, norm != nullptr, b, nt, lane, out + (i64)blockIdx.x * operand_bytes(nt));
}
