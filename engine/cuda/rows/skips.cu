// Residual connections that are more than a sum (engine/model/config/skips.py): streams float32 [T][row], of which a row has
// vectors of `columns` side by side. What a part reads is made of them, and what it gives changes them.
//
// One block of 256 threads per row, which computes in a fixed order, so a row's bits depend on nothing else. All wait
// before touching memory.

#define MOST_BANKS 64
#define MOST_COUNT 8

DEVICE float opened(float x) { return 1.0f / (1.0f + expf(-x)); }

// The first `count` vectors = x [T][columns], but the second one `second` [columns], where that is not null.
extern "C" __global__ void __launch_bounds__(256)
    fill_streams(const float* x, float* streams, int row, int count, int columns, const float* second) {
    pdl_launch();
    pdl_wait();
    float* const to = streams + (i64)blockIdx.x * row;
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = x[(i64)blockIdx.x * columns + i];
        for (int s = 0; s < count; ++s) to[(i64)s * columns + i] = s == 1 && second ? second[i] : v;
    }
}

// out [T][columns] = the sum of the first `count` vectors, weighted by the softmax of score . v / sqrt(mean of squares + eps);
// of one vector, itself.
extern "C" __global__ void __launch_bounds__(256)
    bank_read(const float* streams, int row, int count, int columns, const float* score, float eps, float* out) {
    __shared__ float scratch[32], weights[MOST_BANKS];
    pdl_launch();
    pdl_wait();
    const float* const from = streams + (i64)blockIdx.x * row;
    float most = -INFINITY;
    for (int s = 0; s < count; ++s) {
        float squares = 0.0f, dot = 0.0f;
        for (int i = threadIdx.x; i < columns; i += 256) {
            const float v = from[(i64)s * columns + i];
            squares = fmaf(v, v, squares), dot = fmaf(v, score[i], dot);
        }
        const float length = sqrtf(block_sum(squares, scratch) / columns + eps);
        const float found = block_sum(dot, scratch) / length;
        if (threadIdx.x == 0) weights[s] = found;
        most = fmaxf(most, found);
    }
    __syncthreads();
    float total = 0.0f;
    for (int s = 0; s < count; ++s) total += expf(weights[s] - most);
    for (int i = threadIdx.x; i < columns; i += 256) {
        float sum = 0.0f;
        for (int s = 0; s < count; ++s) sum = fmaf(expf(weights[s] - most) / total, from[(i64)s * columns + i], sum);
        out[(i64)blockIdx.x * columns + i] = count == 1 ? from[i] : sum;
    }
}

// The first vector += part [T][columns]; with a bank above 0 that vector becomes the first, and the first one part.
extern "C" __global__ void __launch_bounds__(256)
    bank_write(float* streams, int row, int columns, const float* part, int bank) {
    pdl_launch();
    pdl_wait();
    float* const to = streams + (i64)blockIdx.x * row;
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = part[(i64)blockIdx.x * columns + i], sum = to[i];
        if (bank > 0) to[(i64)bank * columns + i] = sum;
        to[i] = bank > 0 ? v : sum + v;
    }
}

// out [T][columns] = share * the sum over s of normed_s * sigmoid(gates_s), both [T][count][columns].
extern "C" __global__ void __launch_bounds__(256)
    hyper_read(const float* normed, const float* gates, int count, int columns, float share, float* out) {
    pdl_launch();
    pdl_wait();
    const i64 first = (i64)blockIdx.x * count * columns;
    for (int i = threadIdx.x; i < columns; i += 256) {
        float sum = 0.0f;
        for (int s = 0; s < count; ++s) {
            const i64 at = first + (i64)s * columns + i;
            sum = fmaf(normed[at], opened(gates[at]), sum);
        }
        out[(i64)blockIdx.x * columns + i] = __fmul_rn(sum, share);
    }
}

// Gates of a row behind a barrier: sigmoid(raw * factor + base) of `count` numbers from `first` on; factor and base null: of raw.
DEVICE void gates_of(const float* raw, const float* factor, const float* base, int first, int count, float* gates) {
    const int i = first + threadIdx.x;
    if (threadIdx.x < count) gates[threadIdx.x] = opened(factor ? fmaf(raw[i], factor[i], base[i]) : raw[i]);
    __syncthreads();
}

// out [T][columns] = the sum over s of x_s * (gate_s + eps).
extern "C" __global__ void __launch_bounds__(256)
    gated_read(const float* streams, int count, int columns, const float* raw, int raw_row, const float* factor,
               const float* base, float eps, float* out) {
    __shared__ float gates[MOST_COUNT];
    pdl_launch();
    pdl_wait();
    const float* const from = streams + (i64)blockIdx.x * count * columns;
    gates_of(raw + (i64)blockIdx.x * raw_row, factor, base, 0, count, gates);
    for (int i = threadIdx.x; i < columns; i += 256) {
        float sum = 0.0f;
        for (int s = 0; s < count; ++s) sum = fmaf(from[(i64)s * columns + i], gates[s] + eps, sum);
        out[(i64)blockIdx.x * columns + i] = sum;
    }
}

// x_s += (magnitude * gate_s + eps) * part [T][columns]; the gates are made of raw's numbers from `first` on.
extern "C" __global__ void __launch_bounds__(256)
    gated_write(float* streams, int count, int columns, const float* raw, int raw_row, int first, const float* factor,
                const float* base, float magnitude, float eps, const float* part) {
    __shared__ float gates[MOST_COUNT];
    pdl_launch();
    pdl_wait();
    float* const to = streams + (i64)blockIdx.x * count * columns;
    gates_of(raw + (i64)blockIdx.x * raw_row, factor, base, first, count, gates);
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = part[(i64)blockIdx.x * columns + i];
        for (int s = 0; s < count; ++s)
            to[(i64)s * columns + i] = fmaf(fmaf(magnitude, gates[s], eps), v, to[(i64)s * columns + i]);
    }
}

// x_s = 2 * gate_s * part [T][columns] + the sum over r of C_rs * x_r. Gates and C are made of raw's numbers: from `count` on
// the gates, behind them C, row after row: softmax over s plus eps, then columns, and `iterations` - 1 times rows and columns,
// divided by their sums plus eps.
extern "C" __global__ void __launch_bounds__(256)
    mixed_write(float* streams, int count, int columns, const float* raw, int raw_row, const float* factor, const float* base,
                float eps, int iterations, const float* part) {
    __shared__ float gates[MOST_COUNT], c[MOST_COUNT][MOST_COUNT];
    pdl_launch();
    pdl_wait();
    const float* const given = raw + (i64)blockIdx.x * raw_row;
    float* const to = streams + (i64)blockIdx.x * count * columns;
    gates_of(given, factor, base, count, count, gates);
    const int r = threadIdx.x / count, s = threadIdx.x % count, at = 2 * count + threadIdx.x;
    const bool mine = threadIdx.x < count * count;
    if (mine) c[r][s] = fmaf(given[at], factor[at], base[at]);
    __syncthreads();
    float value = 0.0f;
    if (mine) {
        float most = c[r][0], sum = 0.0f;
        for (int k = 1; k < count; ++k) most = fmaxf(most, c[r][k]);
        for (int k = 0; k < count; ++k) sum += expf(c[r][k] - most);
        value = expf(c[r][s] - most) / sum + eps;
    }
    for (int turn = 1; turn < 2 * iterations; ++turn) {  // odd ones: columns
        __syncthreads();
        if (mine) c[r][s] = value;
        __syncthreads();
        float sum = 0.0f;
        if (mine)
            for (int k = 0; k < count; ++k) sum += turn % 2 ? c[k][s] : c[r][k];
        if (mine) value /= sum + eps;
    }
    __syncthreads();
    if (mine) c[r][s] = value;
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = part[(i64)blockIdx.x * columns + i];
        float x[MOST_COUNT];
#pragma unroll
        for (int k = 0; k < MOST_COUNT; ++k) x[k] = k < count ? to[(i64)k * columns + i] : 0.0f;
        for (int k = 0; k < count; ++k) {
            float sum = __fmul_rn(__fmul_rn(2.0f, gates[k]), v);
#pragma unroll
            for (int l = 0; l < MOST_COUNT; ++l)
                if (l < count) sum = fmaf(c[l][k], x[l], sum);
            to[(i64)k * columns + i] = sum;
        }
    }
}

// out [T][columns] = factor * the sum of `count` vectors from `first` on.
extern "C" __global__ void __launch_bounds__(256)
    sum_streams(const float* streams, int row, int first, int count, int columns, float factor, float* out) {
    pdl_launch();
    pdl_wait();
    const float* const from = streams + (i64)blockIdx.x * row + (i64)first * columns;
    for (int i = threadIdx.x; i < columns; i += 256) {
        float sum = from[i];
        for (int s = 1; s < count; ++s) sum += from[(i64)s * columns + i];
        out[(i64)blockIdx.x * columns + i] = factor * sum;
    }
}
