// A residual stream of several vectors of a token (AltUp; engine/model/config/streams.py): streams float32 [T][COUNT][columns].
//
// One block of 256 threads per row, which computes in a fixed order, so a row's bits depend on nothing else. router float32
// [COUNT][columns] includes the norm's weight and 1 / columns; COUNT at most 8. All wait before touching memory.

#define MOST_STREAMS 8

// m[a] = tanh(router[a] . x / sqrt(mean of squares + eps)) in shared memory, behind a barrier.
DEVICE void modalities(const float* x, const float* router, int count, int columns, float eps, float* m, float* scratch) {
    float squares = 0.0f, dots[MOST_STREAMS] = {};
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = x[i];
        squares = fmaf(v, v, squares);
#pragma unroll
        for (int a = 0; a < MOST_STREAMS; ++a)
            if (a < count) dots[a] = fmaf(router[(i64)a * columns + i], v, dots[a]);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);
#pragma unroll
    for (int a = 0; a < MOST_STREAMS; ++a) {
        if (a >= count) break;
        const float dot = block_sum(dots[a], scratch);
        if (threadIdx.x == 0) m[a] = tanhf(dot * factor);
    }
    __syncthreads();
}

// predicted = streams + coefficients x streams, with the coefficients predict [count * count][count] x m(active stream); and
// out [T][columns] = the active one of it.
extern "C" __global__ void __launch_bounds__(256)
    altup_predict(const float* streams, int count, int active, int columns, const float* router, float eps,
                  const float* predict, float* predicted, float* out) {
    __shared__ float scratch[32], m[MOST_STREAMS], c[MOST_STREAMS * MOST_STREAMS];
    pdl_launch();
    pdl_wait();
    const float* from = streams + (i64)blockIdx.x * count * columns;
    float* to = predicted + (i64)blockIdx.x * count * columns;
    modalities(from + (i64)active * columns, router, count, columns, eps, m, scratch);
    for (int i = threadIdx.x; i < count * count; i += 256) {
        float sum = 0.0f;
        for (int k = 0; k < count; ++k) sum = fmaf(predict[i * count + k], m[k], sum);
        c[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += 256) {
        float x[MOST_STREAMS];
#pragma unroll
        for (int a = 0; a < MOST_STREAMS; ++a) x[a] = a < count ? from[(i64)a * columns + i] : 0.0f;
        for (int a = 0; a < count; ++a) {
            float sum = 0.0f;
#pragma unroll
            for (int b = 0; b < MOST_STREAMS; ++b)
                if (b < count) sum = fmaf(c[a * count + b], x[b], sum);
            const float y = sum + from[(i64)a * columns + i];
            to[(i64)a * columns + i] = y;
            if (a == active) out[(i64)blockIdx.x * columns + i] = y;
        }
    }
}

// streams = predicted + (1 + correct [count][count] x m(made)) (made - active stream of predicted); made [T][columns] becomes
// scale [columns] times the active stream.
extern "C" __global__ void __launch_bounds__(256)
    altup_correct(const float* predicted, int count, int active, int columns, const float* router, float eps,
                  const float* correct, const float* scale, float* made, float* streams) {
    __shared__ float scratch[32], m[MOST_STREAMS], f[MOST_STREAMS];
    pdl_launch();
    pdl_wait();
    const float* from = predicted + (i64)blockIdx.x * count * columns;
    float* to = streams + (i64)blockIdx.x * count * columns;
    float* row = made + (i64)blockIdx.x * columns;
    modalities(row, router, count, columns, eps, m, scratch);
    if (threadIdx.x < count) {
        float sum = 1.0f;
        for (int k = 0; k < count; ++k) sum = fmaf(correct[threadIdx.x * count + k], m[k], sum);
        f[threadIdx.x] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float change = row[i] - from[(i64)active * columns + i];
        for (int a = 0; a < count; ++a) {
            const float y = fmaf(f[a], change, from[(i64)a * columns + i]);
            to[(i64)a * columns + i] = y;
            if (a == active) row[i] = scale[i] * y;
        }
    }
}

// All streams but the first += y [T][columns].
extern "C" __global__ void __launch_bounds__(256) altup_add(float* streams, int count, int columns, const float* y) {
    pdl_launch();
    pdl_wait();
    float* to = streams + (i64)blockIdx.x * count * columns;
    for (int i = threadIdx.x; i < columns; i += 256) {
        const float v = y[(i64)blockIdx.x * columns + i];
        for (int a = 1; a < count; ++a) to[(i64)a * columns + i] += v;
    }
}

// out = or += y [T][columns] at the Euclidean length of target; *_row floats from one row to the next.
extern "C" __global__ void __launch_bounds__(256)
    altup_lengthen(const float* y, const float* target, int target_row, int columns, float* out, int out_row, int add) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const float* from = y + (i64)blockIdx.x * columns;
    const float* as = target + (i64)blockIdx.x * target_row;
    float* to = out + (i64)blockIdx.x * out_row;
    float own = 0.0f, wanted = 0.0f;
    for (int i = threadIdx.x; i < columns; i += 256) own = fmaf(from[i], from[i], own), wanted = fmaf(as[i], as[i], wanted);
    own = block_sum(own, scratch), wanted = block_sum(wanted, scratch);
    const float factor = sqrtf(wanted) / sqrtf(own);
    for (int i = threadIdx.x; i < columns; i += 256) to[i] = add ? fmaf(factor, from[i], to[i]) : factor * from[i];
}
