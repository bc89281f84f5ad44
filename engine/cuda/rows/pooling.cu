// From the vectors of a text's tokens to one: their mean, the first or the last.
//
// grid (texts, Y), 256 threads: the Y blocks of a text share its columns. x float32 [T][columns]; spans int32 [texts][2]: first
// row and rows, at least one; out float32 [texts][columns]. kind: 0 mean, 1 first, 2 last (pooling.py). Sums are formed in
// float64 in the order of the rows, so a text's bits depend on nothing else.
extern "C" __global__ void __launch_bounds__(256)
    pool_rows(const float* x, int columns, const int2* spans, float* out, int kind) {
    pdl_launch();
    pdl_wait();
    const int2 span = spans[blockIdx.x];
    const int first = kind == 2 ? span.x + span.y - 1 : span.x, rows = kind == 0 ? span.y : 1;
    for (int i = blockIdx.y * 256 + threadIdx.x; i < columns; i += gridDim.y * 256) {
        const float* from = x + (i64)first * columns + i;
        double sum = 0.0;
#pragma unroll 4
        for (int row = 0; row < rows; ++row) sum += from[(i64)row * columns];
        out[(i64)blockIdx.x * columns + i] = (float)(sum / rows);
    }
}
