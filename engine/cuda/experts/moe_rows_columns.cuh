// A chunk of a tile of packed weights times the pairs of up to a few groups: what moe_rows.cu does between two waits.
//
// Columns<F>::add(): sums[j] += 16 rows of the chunk times the 8 pairs at x[j]; unpacked once for all groups. A lane (g, t)
// gets rows g and g + 8 for pairs 2t and 2t + 1. finish() gives them as row g: x, y; row g + 8: z, w.
// Two ways, by format:
// - with scales of scales and minimums (Q4_K, Q5_K): a quant's bits alone are a subnormal half, which the tensor cores take
//   as it is. So 32 columns are multiplied unscaled, and their sums by the scale in float32: 240 instructions for 16 x 256
//   weights and 8 pairs where halves with scales take 390. Minimums are a product of their own (TF32, twice 11 bits of the
//   inputs' sums of 32).
// - else: halves with their scales (gemm_unpack.cuh), two chains of sums.

// Where what is multiplied with 256 columns is: blocks of 512 bytes of 32 columns, then two of the sums of 8 columns.
constexpr int INPUT_BYTES = 5120, SUMS_AT = 4096;

DEVICE void multiply(float* c, const u32* a, u32 b0, u32 b1) { mma16(c, a[0], a[1], a[2], a[3], b0, b1); }

template <class F, bool MINIMUMS>
struct ColumnsOf {
    static constexpr int SUMS = 8;  // even columns, odd ones
    static constexpr float UNDO = HalfScales<F>::UNDO;
    template <int N>
    DEVICE void add(const u8* weights, const u8* const (&x)[N], int lane, u32 magic, float (&sums)[N][SUMS]) {
        HalfOperands<F, F::LOW> packed;
        ChunkScales<F> scales;
        scales.load(weights, lane, magic);
#pragma unroll
        for (int step = 0; step < F::COLUMNS / 64; ++step) {
            uint4 b[N][2];
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) b[j][i] = *(const uint4*)(x[j] + step * 1024 + i * 512);
            Operands a;
            packed.load(weights, step, lane);
            packed.make(scales, step, lane, magic, a);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < N; ++j) multiply(sums[j], a[i * 2], b[j][i].x, b[j][i].y);
#pragma unroll
                for (int j = 0; j < N; ++j) multiply(sums[j] + 4, a[i * 2 + 1], b[j][i].z, b[j][i].w);
            }
        }
    }
    DEVICE float4 finish(const float (&v)[SUMS]) { return make_float4(v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]); }
};

template <class F>
struct ColumnsOf<F, true> {
    static constexpr int SUMS = 4;
    static constexpr float UNDO = 1.0f;
    template <int N>
    DEVICE void add(const u8* weights, const u8* const (&x)[N], int lane, u32, float (&sums)[N][SUMS]) {
        // Lane t has the scales of slot t; its factors undo 2^-24 of a subnormal and where the slot's quants are in it.
        const Scales raw = F::load(weights, lane >> 2, lane & 3);
        const float up = lane & 1 ? 1048576.0f : 16777216.0f;
        float factor[2][2], least[2][2];
        const float minus[2] = {-high_half(raw.c), -high_half(raw.d)};
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float d = low_half(row ? raw.d : raw.c) * up;
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                const int at = 12 * (quad * 2 + row);
                const u32 bits = at == 24 ? __funnelshift_r(raw.a, raw.b, 24) : at == 36 ? raw.b >> 4 : raw.a >> at;
                factor[quad][row] = d * small_to_float(bits & 63u);
                least[quad][row] = small_to_float((bits >> 6) & 63u);
            }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float of[2], high[2], products[4] = {};
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                const float4 v = *(const float4*)(x[j] + SUMS_AT + quad * 512);
                of[quad] = (v.x + v.y) + (v.z + v.w);
                high[quad] = __uint_as_float(__float_as_uint(of[quad]) & 0xffffe000u);
            }
            mma8(products, least[0][0], least[0][1], least[1][0], least[1][1], high[0], high[1]);
            mma8(products, least[0][0], least[0][1], least[1][0], least[1][1], of[0] - high[0], of[1] - high[1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[j][i] = fmaf(products[i], minus[i >> 1], sums[j][i]);
        }
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
            Quants quants;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                if (!shares_words<F>(s)) quants = load_quants<F>(weights, quad, s, lane);
                uint4 b[N];
#pragma unroll
                for (int j = 0; j < N; ++j) b[j] = *(const uint4*)(x[j] + (quad * 4 + s) * 512);
                u32 f[8];
                quant_halves<F>(quants, s, f);
                const float first = __shfl_sync(FULL_MASK, factor[quad][0], (lane & 28) | s);
                const float second = __shfl_sync(FULL_MASK, factor[quad][1], (lane & 28) | s);
                float products[N][4] = {};
#pragma unroll
                for (int j = 0; j < N; ++j) multiply(products[j], f, b[j].x, b[j].y);
#pragma unroll
                for (int j = 0; j < N; ++j) multiply(products[j], f + 4, b[j].z, b[j].w);
#pragma unroll
                for (int j = 0; j < N; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[j][i] = fmaf(products[j][i], i & 2 ? second : first, sums[j][i]);
            }
        }
    }
    DEVICE float4 finish(const float (&v)[SUMS]) { return make_float4(v[0], v[1], v[2], v[3]); }
};

template <class F> struct HasMinimums { static constexpr bool VALUE = false; };
template <> struct HasMinimums<Q4_K> { static constexpr bool VALUE = true; };
template <> struct HasMinimums<Q5_K> { static constexpr bool VALUE = true; };
template <class F>
struct Columns : ColumnsOf<F, HasMinimums<F>::VALUE> {};
