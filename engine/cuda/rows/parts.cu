// Parts of a model that only some families have, each as a row kernel of its own: norms that no product folds in, norms
// and rotation of queries and keys outside the attention kernels, caps, limits, and sums over chosen experts.
//
// A row consists of pieces (heads), one unless said otherwise: element i of piece j of row r is x[r * row + j * piece + i].
// grid (rows, pieces), or any for flat arrays. A piece is computed by one block in a fixed order, so its bits depend on
// nothing else. Every thread reads and writes the same elements, so out may be x. All wait before touching memory.

// out = (add ? out : 0) + scale * ((x - mean) / sqrt(mean of squares + eps) * weight + bias); the mean is 0 unless centered;
// weight and bias, null for none, start at weight_piece * piece.
extern "C" __global__ void __launch_bounds__(256)
    normalize_pieces(const float* x, int x_row, int x_piece, float* out, int out_row, int out_piece, int columns,
                     int centered, const float* weight, const float* bias, int weight_piece, float eps, float scale,
                     int add) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const float* from = x + (i64)blockIdx.x * x_row + (i64)blockIdx.y * x_piece;
    float* to = out + (i64)blockIdx.x * out_row + (i64)blockIdx.y * out_piece;
    const i64 at = (i64)blockIdx.y * weight_piece;
    float mean = 0.0f;
    if (centered) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += from[i];
        mean = block_sum(sum, scratch) / columns;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        const float v = from[i] - mean;
        squares = fmaf(v, v, squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float v = (from[i] - mean) * factor;
        if (weight) v *= weight[at + i];
        if (bias) v += bias[at + i];
        to[i] = add ? fmaf(scale, v, to[i]) : scale * v;
    }
}

// out = x with its first n_rot elements turned by positions[row]: pairs (i, i + n_rot / 2) with halves, else (2i, 2i + 1).
// inv_freq float64 (n_rot / 2,); n_rot 0: a copy. A row with position -1 is left alone. Angles as in the attention kernels.
extern "C" __global__ void __launch_bounds__(64)
    rotate_pieces(const float* x, int x_row, int x_piece, float* out, int out_row, int out_piece, int columns, int n_rot,
                  int halves, const int* positions, const double* inv_freq, float rope_scale) {
    pdl_launch();
    pdl_wait();
    const int position = positions[blockIdx.x];
    if (position < 0) return;
    const float* from = x + (i64)blockIdx.x * x_row + (i64)blockIdx.y * x_piece;
    float* to = out + (i64)blockIdx.x * out_row + (i64)blockIdx.y * out_piece;
    const double turn = 6.283185307179586;
    for (int i = threadIdx.x; i < n_rot / 2; i += blockDim.x) {
        const double angle = (double)position * inv_freq[i];
        float s, c;
        sincosf((float)fma(-turn, rint(angle * (1.0 / turn)), angle), &s, &c);
        s *= rope_scale, c *= rope_scale;
        const int a = halves ? i : 2 * i, b = halves ? i + n_rot / 2 : 2 * i + 1;
        const float first = from[a], second = from[b];
        to[a] = fmaf(first, c, -__fmul_rn(second, s));
        to[b] = fmaf(first, s, __fmul_rn(second, c));
    }
    for (int i = n_rot + threadIdx.x; i < columns; i += blockDim.x) to[i] = from[i];
}

// x limited to [-limit, limit]; NaN stays.
extern "C" __global__ void clamp(float* x, i64 count, float limit) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        if (x[i] == x[i]) x[i] = fminf(fmaxf(x[i], -limit), limit);
}

// x = limit * tanh(x / limit)
extern "C" __global__ void softcap(float* x, i64 count, float limit) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        x[i] = limit * tanhf(x[i] / limit);
}

extern "C" __global__ void clear(float* x, i64 count) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) x[i] = 0.0f;
}

// x[row][i] *= f(gate[row][i / each]) with f the sigmoid, or with softplus ln(1 + exp); gate_row floats from one row of the
// gate to the next.
extern "C" __global__ void multiply_gate(float* x, i64 count, int columns, const float* gate, int gate_row, int each,
                                         int softplus) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const float g = gate[i / columns * gate_row + i % columns / each];
        if (softplus) x[i] *= fmaxf(g, 0.0f) + log1pf(expf(-fabsf(g)));
        else x[i] /= 1.0f + expf(-g);
    }
}

// x *= factor
extern "C" __global__ void scale(float* x, i64 count, float factor) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) x[i] *= factor;
}

// x += factor * y
extern "C" __global__ void add_times(float* x, i64 count, const float* y, float factor) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        x[i] = fmaf(factor, y[i], x[i]);
}

// x[row][first .. end-1] = the least float32
extern "C" __global__ void silence(float* x, i64 count, int columns, int first, int end) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        if (i % columns >= first && i % columns < end) x[i] = -3.402823466e38f;
}

// x[row][i] /= divisors[i]
extern "C" __global__ void divide(float* x, i64 count, int columns, const float* divisors) {
    pdl_launch();
    pdl_wait();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        x[i] /= divisors[i % columns];
}

// total[row] += weights[row][k] * y[row] where ids[row][k] is the expert; rows that did not choose it stay as they are.
// weights null: of 1.
extern "C" __global__ void add_chosen(float* total, const float* y, int columns, const int* ids, const float* weights,
                                      int used, int expert) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.x;
    int place = -1;
    for (int k = 0; k < used; ++k)
        if (ids[row * used + k] == expert) place = k;
    if (place < 0) return;
    const float weight = weights ? weights[row * used + place] : 1.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        total[row * columns + i] = fmaf(weight, y[row * columns + i], total[row * columns + i]);
}

// out[row] = weights[row][k] * x[row] where ids[row][k] is the expert, 0 in rows that did not choose it.
extern "C" __global__ void weigh_chosen_rows(const float* x, float* out, int columns, const int* ids, const float* weights,
                                             int used, int expert) {
    pdl_launch();
    pdl_wait();
    const i64 row = blockIdx.x;
    float weight = 0.0f;
    for (int k = 0; k < used; ++k)
        if (ids[row * used + k] == expert) weight = weights[row * used + k];
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        out[row * columns + i] = weight == 0.0f ? 0.0f : weight * x[row * columns + i];
}

// x[row] = what exceeds the mean of the row by `deviations` times the deviation of a sample, 0 elsewhere. grid: rows.
extern "C" __global__ void __launch_bounds__(256) thin_out(float* x, int columns, float deviations) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    float* row = x + (i64)blockIdx.x * columns;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i];
    const float mean = block_sum(sum, scratch) / columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) squares = fmaf(row[i] - mean, row[i] - mean, squares);
    const float least = deviations * sqrtf(block_sum(squares, scratch) / (columns - 1));
    for (int i = threadIdx.x; i < columns; i += blockDim.x) row[i] = fmaxf(row[i] - mean - least, 0.0f);
}
