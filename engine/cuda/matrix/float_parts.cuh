// Products with float32 matrices: how numbers are cut, where outputs are, and the order of sums that all such kernels keep.
//
// TF32 keeps 11 bits of a number's fraction. A packed weight is two halfs of 11 bits, a value of x is cut into its first 11 bits
// and what they leave; three products of these parts are nearly as exact as float32. Sums of tensor cores are cut off, not
// rounded, so they reach over a chunk of 128 columns only.
//
// The order: of each 64 columns, SPLIT parts have 16 each. A part's sum over a chunk is made by tensor cores, 64 columns after 64,
// 16 columns as two products by 8, small terms first. Float32 totals of a part add its chunks in order; at the end the totals of
// the parts are added in order. Squares, for norms, are added likewise, by each of the four lanes that have a row.
//
// Outputs are the rows of the tensor cores' left operand. A lane t has its elements k = t and k = t + 4 of a product: these are
// columns 4t and 4t + 1 of the 16, and in the second product 4t + 2 and 4t + 3. So a packed piece is that operand without any
// reordering, and a lane's four values of x are consecutive.

constexpr int SPLIT = 4, GROUP_BYTES = F32::CHUNK_BYTES / 8;  // of 16 columns of a tile

// One of the matrices that share x. end: tiles of it and of those before; column: where its outputs begin.
struct Matrix {
    const u8* data;
    const float* scale;
    int end, rows, column;
};

// Matrices 0 to 3; those that are not there end where the last one ends. columns: K. x, norm: by_four says that rows begin at
// multiples of 16 bytes and K is a multiple of 4. out: column 0 of the group. second (null: none): each tile is 8 outputs of a
// matrix over the same 8 of another one, and these go there; bias is null then.
#define PRODUCT_PARAMETERS                                                                                          \
    const u8 *data0, const float *scale0, int end0, int rows0, int column0, const u8 *data1, const float *scale1,   \
        int end1, int rows1, int column1, const u8 *data2, const float *scale2, int end2, int rows2, int column2,   \
        const u8 *data3, const float *scale3, int end3, int rows3, int column3, int chunks, int columns,            \
        const float *x, int x_stride, int tokens, const float *norm, float eps, int by_four, const float *bias,     \
        float alpha, int add, float *out, int out_stride, float *second, int second_stride
#define PRODUCT_MATRICES                                                                                            \
    const Matrix a = {data0, scale0, end0, rows0, column0}, b = {data1, scale1, end1, rows1, column1};              \
    const Matrix c = {data2, scale2, end2, rows2, column2}, d = {data3, scale3, end3, rows3, column3};              \
    const Finish finish = {bias, alpha, add, out, out_stride, second, second_stride};

// What a tile of 16 outputs is, found among four matrices; data null behind the last one.
struct Place {
    const u8* data;
    const float* scale;
    int tile, rows, column;  // the tile's number in its matrix
};

DEVICE Place place_of(int tile, const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d) {
    if (tile < a.end) return {a.data, a.scale, tile, a.rows, a.column};
    if (tile < b.end) return {b.data, b.scale, tile - a.end, b.rows, b.column};
    if (tile < c.end) return {c.data, c.scale, tile - b.end, c.rows, c.column};
    if (tile < d.end) return {d.data, d.scale, tile - c.end, d.rows, d.column};
    return {nullptr, nullptr, 0, 0, 0};
}

// The left operand of columns 4t + 2 half and the next one, of a packed piece.
DEVICE void left_of(const uint4& piece, int half, float* a) {
    const u32 first = half ? piece.z : piece.x, second = half ? piece.w : piece.y;
    a[0] = low_half(first), a[1] = low_half(second), a[2] = high_half(first), a[3] = high_half(second);
}

DEVICE void cut(float value, float& first, float& rest) {
    first = __uint_as_float(__float_as_uint(value) & 0xffffe000u);
    rest = value - first;
}

// d[m][n] += left[m] * right[n] of one half of 16 columns; parts 0 are the first ones.
template <int M, int N>
DEVICE void add_half(float (*d)[N][4], const uint4* piece, const uint4* rest, const float4* v, int half) {
    float left[2][M][4], right[2][N][2];
#pragma unroll
    for (int m = 0; m < M; ++m) left_of(piece[m], half, left[0][m]), left_of(rest[m], half, left[1][m]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        cut(half ? v[n].z : v[n].x, right[0][n][0], right[1][n][0]);
        cut(half ? v[n].w : v[n].y, right[0][n][1], right[1][n][1]);
    }
    // Small terms first; products that follow each other belong to different sums.
#pragma unroll
    for (int term = 0; term < 3; ++term)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float *const w = left[term == 1][m], *const by = right[term == 0][n];
                mma8(d[m][n], w[0], w[1], w[2], w[3], by[0], by[1]);
            }
}

// Adds four squares, and multiplies by the norm's weights.
DEVICE void weigh(float4& v, const float4& weight, float& square) {
    square = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, square))));
    v.x = __fmul_rn(v.x, weight.x), v.y = __fmul_rn(v.y, weight.y);
    v.z = __fmul_rn(v.z, weight.z), v.w = __fmul_rn(v.w, weight.w);
}

// What becomes of a sum. Matrices and targets as the kernels have them.
struct Finish {
    const float* bias;
    float alpha;
    int add;
    float* out;
    int out_stride;
    float* second;
    int second_stride;

    // at: output in its tile (0..15). factor: of a norm, or 1.
    __device__ __forceinline__ void operator()(const Place& place, int at, int token, float value, bool normed, float factor) const {
        const int output = second ? place.tile * 8 + at % 8 : place.tile * 16 + at;
        if (!place.data || output >= place.rows) return;
        value = __fmul_rn(value, place.scale[0]);
        if (normed) value = __fmul_rn(value, factor);
        if (bias) value = __fadd_rn(value, bias[place.column + output]);
        float* const to = second && at >= 8 ? second + (i64)token * second_stride + output
                                            : out + (i64)token * out_stride + place.column + output;
        *to = fmaf(alpha, value, add ? *to : 0.0f);
    }
};

DEVICE float norm_factor(float square, int columns, float eps) { return 1.0f / sqrtf(square / columns + eps); }
