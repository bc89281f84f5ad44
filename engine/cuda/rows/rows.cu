// Small row-wise steps of prompts and expert mixtures: whatever is not folded into a product.
// Each kernel waits for its predecessors before touching memory; one block serves one row unless said otherwise.

DEVICE float activate(float x, int kind) {
    switch (kind) {
        case 1: return x / (1.0f + expf(-x));                                                        // SiLU
        case 2: return 0.5f * x * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x)));    // GELU, tanh form
        case 3: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));                                  // GELU, exact
        case 4: return fmaxf(x, 0.0f);
        case 5: return x > 0.0f ? x * x : 0.0f;
        default: return x;
    }
}

// out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight, or x itself where weight is null, as Out.
template <typename Out>
DEVICE void normalize_row(const float* x, int stride, Out* out, int columns, const float* weight, float eps) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const float* row = x + (i64)blockIdx.x * stride;
    Out* target = out + (i64)blockIdx.x * columns;
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i] * row[i];
        factor = 1.0f / sqrtf(block_sum(sum, scratch) / columns + eps);
    }
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float value = weight ? row[i] * factor * weight[i] : row[i];
        if constexpr (sizeof(Out) == 2) {
            // Saturates: an infinity would turn a whole row of the product into NaN.
            target[i] = float_to_half(fminf(fmaxf(value, -65504.0f), 65504.0f));
        } else {
            target[i] = value;
        }
    }
}

extern "C" __global__ void normalize_half(const float* x, int stride, u16* out, int columns, const float* weight, float eps) {
    normalize_row(x, stride, out, columns, weight, eps);
}

extern "C" __global__ void normalize_float(const float* x, int stride, float* out, int columns, const float* weight,
                                           float eps) {
    normalize_row(x, stride, out, columns, weight, eps);
}

// h[i] = activation(h[i]) * up[i]; up null: without the product. Any grid.
// Activation 6: g = min(h, 7), u = clamp(up, -7, 7), h = g * sigmoid(1.702 g) * (u + 1).
extern "C" __global__ void gate(float* h, const float* up, i64 count, int activation) {
    pdl_launch();
    pdl_wait();
    if (activation == 6) {
        for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
            const float g = fminf(h[i], 7.0f), u = fminf(fmaxf(up[i], -7.0f), 7.0f);
            h[i] = g / (1.0f + expf(-1.702f * g)) * (u + 1.0f);
        }
        return;
    }
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        h[i] = activate(h[i], activation) * (up ? up[i] : 1.0f);
}

// out[row][i] += alpha * bias[i]
extern "C" __global__ void add_bias(float* out, int stride, int columns, const float* bias, float alpha) {
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < columns; i += blockDim.x) out[(i64)blockIdx.x * stride + i] += alpha * bias[i];
}

// total[row][i] += weight[row][index] * y[row][i]; weight null: factor 1.
extern "C" __global__ void add_scaled(float* total, const float* y, int columns, const float* weight, int weight_stride,
                                      int index) {
    pdl_launch();
    pdl_wait();
    const float factor = weight ? weight[(i64)blockIdx.x * weight_stride + index] : 1.0f;
    if (factor == 0.0f) return;
    const i64 base = (i64)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) total[base + i] += factor * y[base + i];
}

extern "C" __global__ void copy_rows(const float* from, float* to, i64 count) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) to[i] = from[i];
}

extern "C" __global__ void sigmoid(float* x, i64 count) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        x[i] = 1.0f / (1.0f + expf(-x[i]));
}

// Reads everything once; writes only if the sum is one it cannot have, so that nothing is optimized away.
extern "C" __global__ void read_all(const uint4* data, i64 count, float* out) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    u32 sum = 0;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        const uint4 a = __ldcs(data + i), b = __ldcs(data + i + step);
        const uint4 c = __ldcs(data + i + 2 * step), d = __ldcs(data + i + 3 * step);
        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += step) sum ^= __ldcs(data + i).x;
    if (sum == 0x12345678u) out[0] = 1.0f;
}
