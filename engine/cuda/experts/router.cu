// Scores of the experts of a row: the router, an unquantized packed matrix, times norm(x).
//
// grid: (tiles * 8, Y). A block multiplies rows g and g + 8 of a tile, g = blockIdx.x % 8, which are side by side in
// the layout, by every Y-th row of x. A thread has 4 columns at a time; its first ITEMS fours of weights wait in registers
// for x. Small blocks on many multiprocessors: with a tile each, 8 blocks would read the router of 128 experts.
// Needs FORMAT (F32, F16 or BF16); x, norm: columns a multiple of 4, 16-byte aligned rows.

constexpr int PIECES = FORMAT::LOW / 16, ITEMS = 2;

struct Four {
    uint4 piece[PIECES];
};

// The four columns of an item: (quad, s, w, t) counted up, 4t of 16w of 32s of 128 quad.
DEVICE Four load_weights(const u8* tile, int item, int items, int g) {
    Four v;
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        const u8* const at = tile + (((i64)(item >> 2) * PIECES + n) * 32 + g * 4 + (item & 3)) * 16;
        v.piece[n] = item < items ? load_stream(at) : make_uint4(0u, 0u, 0u, 0u);
    }
    return v;
}

DEVICE float4 unpack(const Four& v, int row) {
    float4 w = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        const u32 first = row ? v.piece[n].y : v.piece[n].x, second = row ? v.piece[n].w : v.piece[n].z;
        w.x += low_half(first), w.y += high_half(first), w.z += low_half(second), w.w += high_half(second);
    }
    return w;
}

DEVICE float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// scores[row][e] = alpha * (router_e norm(x[row]) + bias_e). blockDim a multiple of 32.
extern "C" __global__ void __launch_bounds__(1024)
    router(const u8* data, const float* scale, int experts, int chunks, int columns, const float* x, int x_stride, int rows,
           const float* norm, float eps, const float* bias, float alpha, float* scores, float one_column) {
    __shared__ float sums[32][3];
    const int g = blockIdx.x & 7, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, items = columns / 4;
    const u8* const tile = data + (i64)(blockIdx.x >> 3) * chunks * FORMAT::CHUNK_BYTES;
    const float4 one = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    Four weights[ITEMS];
    float4 factor[ITEMS];
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const int item = n * blockDim.x + threadIdx.x;
        weights[n] = load_weights(tile, item, items, g);
        factor[n] = norm && item < items ? __ldg((const float4*)norm + item) : one;
    }
    pdl_wait();
    pdl_launch();  // the experts' kernel takes as long to start as this one to end, and has x to convert
    const bool fits = items <= ITEMS * blockDim.x;  // else the registers hold other weights after the first row
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const float4* const from = (const float4*)(x + (i64)row * x_stride);
        float first = 0.0f, second = 0.0f, square = 0.0f;
        for (int start = threadIdx.x; start < items; start += ITEMS * blockDim.x) {
            float4 v[ITEMS];
#pragma unroll
            for (int n = 0; n < ITEMS; ++n) {
                const int item = start + n * blockDim.x;
                v[n] = item < items ? __ldcg(from + item) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (!fits && (start >= ITEMS * blockDim.x || row != blockIdx.y)) {
                    weights[n] = load_weights(tile, item, items, g);
                    factor[n] = norm && item < items ? __ldg((const float4*)norm + item) : one;
                }
            }
#pragma unroll
            for (int n = 0; n < ITEMS; ++n) {
                square = dot(v[n], v[n], square);
                v[n].x *= factor[n].x, v[n].y *= factor[n].y, v[n].z *= factor[n].z, v[n].w *= factor[n].w;
                first = dot(v[n], unpack(weights[n], 0), first);
                second = dot(v[n], unpack(weights[n], 1), second);
            }
        }
        first = warp_sum(first), second = warp_sum(second), square = warp_sum(square);
        if (lane == 0) sums[warp][0] = first, sums[warp][1] = second, sums[warp][2] = square;
        __syncthreads();
        if (warp == 0) {
            const bool live = lane < blockDim.x / 32;
            first = warp_sum(live ? sums[lane][0] : 0.0f);
            second = warp_sum(live ? sums[lane][1] : 0.0f);
            square = warp_sum(live ? sums[lane][2] : 0.0f);
            const int expert = (blockIdx.x >> 3) * 16 + g + lane * 8;
            if (lane <= 1 && expert < experts) {
                float score = lane ? second : first;
                if (FORMAT::HAS_SCALE) score *= scale[0];
                if (norm) score *= rsqrtf(fmaf(square, one_column, eps));
                if (bias) score += bias[expert];
                scores[(i64)row * experts + expert] = score * alpha;
            }
        }
        if (row + gridDim.y < rows) __syncthreads();  // the sums have been read
    }
}

// ---- up to 64 rows on tensor cores ---------------------------------------------------------------------------------
#if ROWS_TOGETHER

// The same for float32 routers and 8 rows of x together: router.cu's blocks would read x once for every two experts.
//
// grid: (tiles, eights of rows), blockDim a multiple of 32. A warp takes 128 columns at a time, whose weights it asks for
// before the wait. Numbers are cut as float_parts.cuh says; sums over 128 columns are then added in order.
// Shared memory: of each 128 columns 8 x SUM_STRIDE floats, and the norm's weights.
constexpr int TOGETHER = 8, SEGMENT = 128, SIXTEENS = SEGMENT / 16, SUM_STRIDE = 17;  // 16 experts and the square of x
static_assert(PIECES == 2 && FORMAT::COLUMNS % SEGMENT == 0, "two halfs, and whole segments of zeros behind the columns");

struct Segment {
    uint4 first[SIXTEENS], rest[SIXTEENS];
    __device__ __forceinline__ void load(const u8* at, int lane) {
#pragma unroll
        for (int i = 0; i < SIXTEENS; ++i) {
            first[i] = load_stream(at + i * 1024 + lane * 16);
            rest[i] = load_stream(at + i * 1024 + 512 + lane * 16);
        }
    }
};

extern "C" __global__ void __launch_bounds__(512)
    router_rows(const u8* data, const float* scale, int experts, int chunks, int columns, const float* x, int x_stride,
                int rows, const float* norm, float eps, const float* bias, float alpha, float* scores, float one_column) {
    DYNAMIC_SHARED(shared);
    float* const partial = (float*)shared;  // [segment][row][expert]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
    const int segments = (columns + SEGMENT - 1) / SEGMENT, row = blockIdx.y * TOGETHER + g;
    float* const factors = partial + segments * (TOGETHER * SUM_STRIDE);
    const u8* const tile = data + (i64)blockIdx.x * chunks * FORMAT::CHUNK_BYTES;
    Segment weights;
    if (warp < segments) weights.load(tile + (i64)warp * (SIXTEENS * 1024), lane);
    if (norm)
        for (int i = threadIdx.x; i * 4 < columns; i += blockDim.x)
            ((float4*)factors)[i] = __ldg((const float4*)norm + i);
    __syncthreads();
    pdl_wait();
    pdl_launch();
    const float* const from = x + (i64)min(row, rows - 1) * x_stride + t * 4;
    for (int segment = warp; segment < segments; segment += warps) {
        if (segment != warp) weights.load(tile + (i64)segment * (SIXTEENS * 1024), lane);
        float4 v[SIXTEENS];
#pragma unroll
        for (int i = 0; i < SIXTEENS; ++i) {
            const int column = segment * SEGMENT + i * 16;
            v[i] = column + t * 4 < columns ? __ldcg((const float4*)(from + column)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        float sums[2][4] = {}, square = 0.0f;  // of the two halves, so that products do not wait for each other
#pragma unroll
        for (int i = 0; i < SIXTEENS; ++i) {
            const int column = segment * SEGMENT + i * 16 + t * 4;
            square = dot(v[i], v[i], square);
            if (norm && column < columns) {
                const float4 by = *(const float4*)(factors + column);
                v[i].x *= by.x, v[i].y *= by.y, v[i].z *= by.z, v[i].w *= by.w;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float first[4], rest[4], right[2], left[2];
                left_of(weights.first[i], half, first), left_of(weights.rest[i], half, rest);
                cut(half ? v[i].z : v[i].x, right[0], left[0]);
                cut(half ? v[i].w : v[i].y, right[1], left[1]);
                float* const sum = sums[half];  // small terms first
                mma8(sum, rest[0], rest[1], rest[2], rest[3], right[0], right[1]);
                mma8(sum, first[0], first[1], first[2], first[3], left[0], left[1]);
                mma8(sum, first[0], first[1], first[2], first[3], right[0], right[1]);
            }
        }
        float* const to = partial + segment * (TOGETHER * SUM_STRIDE);
#pragma unroll
        for (int n = 0; n < 4; ++n) to[(2 * t + (n & 1)) * SUM_STRIDE + g + (n >> 1) * 8] = sums[0][n] + sums[1][n];
        square += __shfl_xor_sync(FULL_MASK, square, 1);
        square += __shfl_xor_sync(FULL_MASK, square, 2);
        if (t == 0) to[g * SUM_STRIDE + 16] = square;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < TOGETHER * 16; at += blockDim.x) {
        const int own = at >> 4, expert = blockIdx.x * 16 + (at & 15), out = blockIdx.y * TOGETHER + own;
        if (expert >= experts || out >= rows) continue;
        float score = 0.0f, square = 0.0f;
        for (int segment = 0; segment < segments; ++segment) {
            const float* const of = partial + (segment * TOGETHER + own) * SUM_STRIDE;
            score += of[at & 15], square += of[16];
        }
        if (FORMAT::HAS_SCALE) score *= scale[0];
        if (norm) score *= rsqrtf(fmaf(square, one_column, eps));
        if (bias) score += bias[expert];
        scores[(i64)out * experts + expert] = score * alpha;
    }
}
#endif
