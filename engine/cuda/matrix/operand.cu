// x of gemm.cu: rows, normed where wanted, as halfs in the order the tensor cores read them.
// Blocks of 64 columns; in a block `pitch` rows of 128 bytes; in a row 16-byte units exchanged by unit ^ (row & 7); in 16
// columns the order of place_of_column(). Columns are filled up with zeros to a multiple of 128.

// One block per row. weight null: no norm. Saturates: an infinity would turn a whole row of the product into NaN.
// places: (rows, copies), where copies of a row go, -1 = nowhere; null: each row once, to its own place. weights: (rows,
// copies), what each copy is multiplied by; null: by 1.
extern "C" __global__ void __launch_bounds__(256)
    operand_half(const float* x, int stride, u8* out, int pitch, int columns, int padded, const float* weight, float eps,
                 const int* places, int copies, const float* weights) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const float* const row = x + (i64)blockIdx.x * stride;
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < columns; i += 256) sum += row[i] * row[i];
        factor = 1.0f / sqrtf(block_sum(sum, scratch) / columns + eps);
    }
    const bool whole = columns % 4 == 0 && stride % 4 == 0 && ((u64)x & 15) == 0;
    for (int first = threadIdx.x * 16; first < padded; first += 256 * 16) {
        float v[16];
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const int c = first + i;
            float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (whole && c < columns) {
                four = *(const float4*)(row + c);
            } else {
                if (c < columns) four.x = row[c];
                if (c + 1 < columns) four.y = row[c + 1];
                if (c + 2 < columns) four.z = row[c + 2];
                if (c + 3 < columns) four.w = row[c + 3];
            }
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
        u32 pair[8];
        auto round = [&](float by) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int c = first + i, place = 2 * (i >> 2) + ((i & 3) >> 1) + 8 * (i & 1);
                float value = v[i];
                if (weight) value = value * factor * (c < columns ? weight[c] : 0.0f);
                const u32 half = saturated_half(value * by);
                pair[place >> 1] = (place & 1) ? pair[place >> 1] | (half << 16) : half;
            }
        };
        if (!weights) round(1.0f);
        const int unit = (first >> 3) & 7;
        for (int copy = 0; copy < copies; ++copy) {
            const int place = places ? places[blockIdx.x * copies + copy] : (int)blockIdx.x, turn = place & 7;
            if (place < 0) continue;
            if (weights) round(weights[blockIdx.x * copies + copy]);
            u8* const line = out + ((i64)(first >> 6) * pitch + place) * 128;
            *(uint4*)(line + ((unit ^ turn) * 16)) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            *(uint4*)(line + (((unit + 1) ^ turn) * 16)) = make_uint4(pair[4], pair[5], pair[6], pair[7]);
        }
    }
}
