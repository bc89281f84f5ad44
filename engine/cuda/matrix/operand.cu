// x of gemm.cu: rows, normed where wanted, as halfs in the order the tensor cores read them.
// Blocks of 64 columns; in a block `pitch` rows of 128 bytes; in a row 16-byte units exchanged by unit ^ (row & 7); in 16
// columns the order of place_of_column(). Columns are filled up with zeros to a multiple of 128.

constexpr int THREADS = 256, STEP = THREADS * 8;  // a thread has 8 columns at a time
constexpr int KEPT = 4;  // so often they stay in registers between the sum and the result
constexpr int EARLY = 2;  // so many of the norm's weights are there before the row is

// Eight columns from k on; past the end zeros. whole: each four of them are inside or not, and aligned.
DEVICE void eight_of(const float* row, int k, int columns, bool whole, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const int c = k + i;
        float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (whole) {
            if (c < columns) four = *(const float4*)(row + c);
        } else {
            if (c < columns) four.x = row[c];
            if (c + 1 < columns) four.y = row[c + 1];
            if (c + 2 < columns) four.z = row[c + 2];
            if (c + 3 < columns) four.w = row[c + 3];
        }
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

// One block per row, of which up to STEP * KEPT columns are read once and all at the same time. weight null: no norm.
// Saturates: an infinity would turn a whole row of the product into NaN. places: (rows, copies), where copies of a row go,
// -1 = nowhere; null: each row once, to its own place. weights: (rows, copies), what each copy is multiplied by; null: by 1.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    operand_half(const float* x, int stride, u8* out, int pitch, int columns, int padded, const float* weight,
                 float eps, const int* places, int copies, const float* weights) {
    __shared__ float scratch[32];
    pdl_launch();
    const float* const row = x + (i64)blockIdx.x * stride;
    const bool whole = columns % 4 == 0 && stride % 4 == 0 && ((u64)x & 15) == 0;
    const bool whole_weight = columns % 4 == 0 && ((u64)weight & 15) == 0;
    const int own = threadIdx.x * 8;
    float kept[KEPT][8], early[EARLY][8];
#pragma unroll
    for (int n = 0; n < EARLY; ++n)
        if (weight) eight_of(weight, n * STEP + own, columns, whole_weight, early[n]);
    pdl_wait();
#pragma unroll
    for (int n = 0; n < KEPT; ++n)
        if (n * STEP < padded) eight_of(row, n * STEP + own, columns, whole, kept[n]);
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEPT; ++n)
            if (n * STEP < padded)
#pragma unroll
                for (int i = 0; i < 8; ++i) sum = fmaf(kept[n][i], kept[n][i], sum);
        for (int k = KEPT * STEP + threadIdx.x; k < columns; k += THREADS) sum = fmaf(row[k], row[k], sum);
        factor = 1.0f / sqrtf(block_sum(sum, scratch) / columns + eps);
    }
    // Of 16 columns the even ones make a unit and the odd ones the next: of 8 columns, half of each.
    auto write = [&](int first, float(&v)[8], const float(&norm)[8]) {
        if (weight)
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = v[i] * factor * norm[i];
        for (int copy = 0; copy < copies; ++copy) {
            const int place = places ? places[blockIdx.x * copies + copy] : (int)blockIdx.x, turn = place & 7;
            if (place < 0) continue;
            const float by = weights ? weights[blockIdx.x * copies + copy] : 1.0f;
            u32 pair[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (i & 1) * 4 + (i >> 1);
                pair[i] = (u32)saturated_half(v[at] * by) | ((u32)saturated_half(v[at + 2] * by) << 16);
            }
            const int unit = (first >> 3) & 6;
            u8* const line = out + ((i64)(first >> 6) * pitch + place) * 128 + (first & 8);
            *(uint2*)(line + ((unit ^ turn) * 16)) = make_uint2(pair[0], pair[1]);
            *(uint2*)(line + (((unit + 1) ^ turn) * 16)) = make_uint2(pair[2], pair[3]);
        }
    };
#pragma unroll
    for (int n = 0; n < KEPT; ++n) {
        const int first = n * STEP + own;
        if (first >= padded) return;
        if (n < EARLY) {
            write(first, kept[n], early[n]);
        } else {
            if (weight) eight_of(weight, first, columns, whole_weight, early[0]);
            write(first, kept[n], early[0]);
        }
    }
    for (int first = KEPT * STEP + own; first < padded; first += STEP) {
        eight_of(row, first, columns, whole, kept[0]);
        if (weight) eight_of(weight, first, columns, whole_weight, early[0]);
        write(first, kept[0], early[0]);
    }
}
