// Activations as batch_matvec.cu reads them: halves times a power of two per sequence, in the order of wgmma's operand.
//
// out: per 256 columns 16 steps of 16 columns, then the sums of 32 inputs; each is NT groups of 8 sequences of two core
// matrices of 8 sequences x 8 halves. A step: its even columns, its odd ones. Sums: columns 2s + quad for sub-block s of that
// quad, as halves, then what those leave over. They are sums of the halves, not of x: so rounding x moves no minimum.

DEVICE u32 round_two(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// One block of 256 threads per sequence. factors[b] undoes the power of two, and is the factor of an RMSNorm.
extern "C" __global__ void __launch_bounds__(256)
    batch_operand(const float* x, int x_stride, const float* norm, float eps, int columns, int nt, u8* out, float* factors) {
    __shared__ float scratch[16];
    constexpr int KEPT = 4;
    const int b = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, padded = (columns + 255) & ~255;
    const float* const row = x + (i64)b * x_stride;
    const bool wide = ((columns | x_stride) & 3) == 0 && (((u64)x | (u64)norm) & 15) == 0;
    pdl_launch();
    float4 weight[KEPT], kept[KEPT];
    auto load = [&](const float* from, int k, float fill, bool fresh) {
        float4 v = make_float4(fill, fill, fill, fill);
        if (wide) {
            if (k < columns) v = fresh ? __ldcg((const float4*)(from + k)) : __ldg((const float4*)(from + k));
        } else {
            if (k < columns) v.x = __ldcg(from + k);
            if (k + 1 < columns) v.y = __ldcg(from + k + 1);
            if (k + 2 < columns) v.z = __ldcg(from + k + 2);
            if (k + 3 < columns) v.w = __ldcg(from + k + 3);
        }
        return v;
    };
    auto times = [&](float4& v, const float4& w) { v.x *= w.x, v.y *= w.y, v.z *= w.z, v.w *= w.w; };
    if (norm)
#pragma unroll
        for (int n = 0; n < KEPT; ++n) weight[n] = load(norm, (n * 256 + threadIdx.x) * 4, 1.0f, false);
    pdl_wait();
    float square = 0.0f, largest = 0.0f;
    auto look = [&](float4& v, const float4& w) {
        square = fmaf(v.x, v.x, square), square = fmaf(v.y, v.y, square);
        square = fmaf(v.z, v.z, square), square = fmaf(v.w, v.w, square);
        if (norm) times(v, w);
        largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    };
#pragma unroll
    for (int n = 0; n < KEPT; ++n) kept[n] = load(row, (n * 256 + threadIdx.x) * 4, 0.0f, true);
#pragma unroll
    for (int n = 0; n < KEPT; ++n) look(kept[n], weight[n]);
#pragma unroll 4
    for (int k = (KEPT * 256 + threadIdx.x) * 4; k < columns; k += 1024) {
        float4 v = load(row, k, 0.0f, true);
        look(v, norm ? load(norm, k, 1.0f, false) : v);
    }
    square = warp_sum(square), largest = warp_max(largest);
    if (lane == 0) scratch[warp] = square, scratch[8 + warp] = largest;
    __syncthreads();
    square = 0.0f, largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) square += scratch[i], largest = fmaxf(largest, scratch[8 + i]);
    // 2^e with 2^e * largest in [2^9, 2^10): sums of 32 are halves too
    const u32 exponent = min(max(__float_as_uint(largest) >> 23, 20u), 240u);
    const float scale = __uint_as_float((263u - exponent) << 23), undo = __uint_as_float((exponent - 9u) << 23);
    if (threadIdx.x == 0) factors[b] = norm ? undo * rsqrtf(fmaf(square, 1.0f / columns, eps)) : undo;

    const int place = (b >> 3) * 256 + (b & 7) * 16, step_bytes = nt * 256;
    auto store = [&](float4 v, int k) {
        const u32 even = round_two(v.x * scale, v.z * scale), odd = round_two(v.y * scale, v.w * scale);
        u8* const chunk = out + (i64)(k >> 8) * (17 * step_bytes) + place;
        u8* const at = chunk + ((k >> 4) & 15) * step_bytes + (k & 12);
        *(u32*)at = even;
        *(u32*)(at + 128) = odd;
        float sum = (low_half(even) + low_half(odd)) + (high_half(even) + high_half(odd));
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        sum += __shfl_xor_sync(FULL_MASK, sum, 4);
        if ((lane & 7) == 0) {
            const int s = (k >> 5) & 3, quad = (k >> 7) & 1;
            const u16 high = float_to_half(sum);
            u16* const sums = (u16*)(chunk + 16 * step_bytes) + s * 2 + quad;
            sums[0] = high;
            sums[64] = float_to_half(sum - half_to_float(high));
        }
    };
#pragma unroll
    for (int n = 0; n < KEPT; ++n) {
        const int k = (n * 256 + threadIdx.x) * 4;
        if (k < padded) store(kept[n], k);
    }
    for (int k = (KEPT * 256 + threadIdx.x) * 4; k < padded; k += 1024) {
        float4 v = load(row, k, 0.0f, true);
        if (norm) times(v, load(norm, k, 1.0f, false));
        store(v, k);
    }
}
