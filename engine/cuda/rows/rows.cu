// Small row-wise steps of prompts and expert mixtures: whatever is not folded into a product.
// Each kernel waits for its predecessors before touching memory; one block serves one row unless said otherwise.

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
            target[i] = saturated_half(value);
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

// h[i] = activation(h[i]) * up[i]; up null: without the product. limit above 0: up is limited to [-limit, limit], and what
// the activation gives, or with limits_gate what it takes, to at most the limit. a .. d: of activations that have constants.
// Any grid.
extern "C" __global__ void gate(float* h, const float* up, i64 count, int activation, float limit, int limits_gate, float a,
                                float b, float c, float d) {
    pdl_launch();
    pdl_wait();
    if (limit > 0.0f || activation > 5) {
        for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
            float g = h[i], u = up ? up[i] : 1.0f;
            if (limit > 0.0f && limits_gate) g = fminf(g, limit);
            if (activation == 6) g = xielu(g, a, b, c, d);
            else if (activation == 7) g = situ(g, a), u = b > 0.0f ? b * tanhf(u / b) : u;
            else g = activate(g, activation);
            if (limit > 0.0f) {
                u = fminf(fmaxf(u, -limit), limit);
                if (!limits_gate) g = fminf(g, limit);
            }
            h[i] = g * u;
        }
        return;
    }
    if (activation == 5) {
        for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
            h[i] = clamped_swiglu(h[i], up[i]);
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

// total[row][i] += sigmoid(score[row * stride]) * y[row][i].
extern "C" __global__ void add_gated(float* total, const float* y, int columns, const float* score, int stride) {
    pdl_launch();
    pdl_wait();
    const float factor = 1.0f / (1.0f + expf(-score[(i64)blockIdx.x * stride]));
    const i64 base = (i64)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) total[base + i] += factor * y[base + i];
}

extern "C" __global__ void copy_rows(const float* from, float* to, i64 count) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) to[i] = from[i];
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
