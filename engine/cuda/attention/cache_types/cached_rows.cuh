// Rows of keys and values as the cache holds them: how kernels find, round, store and read them.
//
// Numbers (float16, float32) are themselves. With CACHE_Q8 a row is blocks of 32 numbers: bytes q + 128, q from -127 to
// 127, and a float16 scale for each block; a number is q times scale. Of a page and cache head the bytes come first,
// [PAGE][DIM], then the scales, [PAGE][DIM / 32]: engine/cuda/attention/cache.py allocates them. Rounding a number takes its whole block, one number a lane.
// Needs cache_numbers.cuh, attention_common.cuh.

#if CACHE_Q8
#define BLOCK 32
#define HEAD_BYTES(dim) (PAGE * ((dim) + (dim) / BLOCK * 2))  // of a page and cache head
static_assert(KEY_DIM % BLOCK == 0 && VALUE_DIM % BLOCK == 0 && BLOCK == WARP, "a lane has a number of a block");
#define ROUNDING_LOOP _Pragma("unroll 1")  // where code is long already
typedef u16 mark_t;
struct Rounded {
    u8 byte;
    u16 scale;
};

DEVICE float number_of(Rounded v) { return (float)((int)v.byte - 128) * half_to_float(v.scale); }

// By all lanes of a warp, which hold the numbers of a block, as engine/model/kv_format.py says. Integers order numbers that
// are not negative as they are, and put infinity and NaN above: the scale of a block that has one is not finite either.
DEVICE Rounded rounded(float v) {
    int most = (int)(__float_as_uint(v) & 0x7fffffffu);
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset >>= 1) most = max(most, __shfl_xor_sync(FULL_MASK, most, offset));
    // most / 127, correctly rounded without the branches of a division (P. Markstein, 1990); NaN where it is infinite.
    const float near = __fmul_rn(__int_as_float(most), 1.0f / 127.0f);
    const float exact = fmaf(fmaf(-127.0f, near, __int_as_float(most)), 1.0f / 127.0f, near);
    const u16 scale = float_to_half(exact);
    const bool usable = scale != 0 && (scale & 0x7c00u) != 0x7c00u;
    return {(u8)(128 + (usable ? (int)roundf(v * (1.0f / exact)) : 0)), scale};
}

// Prompts multiply values as float16.
#define LARGEST_SCALE 0x6007u  // 127 of them are a float16 still
DEVICE bool is_finite(Rounded v) { return v.scale <= LARGEST_SCALE; }
DEVICE Rounded zero_number() { return {128, 0}; }
DEVICE mark_t spoilt() { return 0x7fffu; }
DEVICE mark_t mark_of(Rounded v) { return v.scale; }

template <int DIM>
struct CachedRow {
    u8* bytes;
    u16* scales;
    __device__ __forceinline__ CachedRow(const cache_t* cache, int page, int kv_head, int p) {
        u8* const head = const_cast<cache_t*>(cache) + ((i64)page * KV_HEADS + kv_head) * HEAD_BYTES(DIM);
        bytes = head + (p & (PAGE - 1)) * DIM;
        scales = (u16*)(head + PAGE * DIM) + (p & (PAGE - 1)) * (DIM / BLOCK);
    }
    __device__ __forceinline__ float operator[](int d) const { return number_of({bytes[d], scales[d / BLOCK]}); }
    __device__ __forceinline__ void load(float (&to)[4], int d) const {
        const u32 v = *(const u32*)(bytes + d);
        const float scale = half_to_float(scales[d / BLOCK]);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = (float)((int)(v >> 8 * i & 255u) - 128) * scale;
    }
    // The mark is the last block's scale, which its last lane writes as those of all blocks.
    __device__ __forceinline__ void store_all_but_mark(int d, Rounded v) const {
        bytes[d] = v.byte;
        if (d % BLOCK == BLOCK - 1 && d != SPOILT_KEY_AT) scales[d / BLOCK] = v.scale;
    }
    __device__ __forceinline__ void store(int d, Rounded v) const {
        bytes[d] = v.byte;
        if (d % BLOCK == BLOCK - 1) scales[d / BLOCK] = v.scale;
    }
    __device__ __forceinline__ void store_mark(mark_t v) const { scales[SPOILT_KEY_AT / BLOCK] = v; }
};
#else
#define ROUNDING_LOOP
typedef cache_t mark_t;
struct Rounded {
    cache_t bits;
};

DEVICE float number_of(Rounded v) { return from_cache(v.bits); }
DEVICE Rounded rounded(float v) { return {to_cache(v)}; }
DEVICE bool is_finite(Rounded v) {
#if CACHE_HALF
    return (v.bits & 0x7c00u) != 0x7c00u;
#else
    return (__float_as_uint(v.bits) & 0x7f800000u) != 0x7f800000u;
#endif
}
DEVICE Rounded zero_number() { return {(cache_t)0}; }
DEVICE mark_t spoilt() { return to_cache(not_a_number()); }
DEVICE mark_t mark_of(Rounded v) { return v.bits; }

template <int DIM>
struct CachedRow {
    cache_t* numbers;
    __device__ __forceinline__ CachedRow(const cache_t* cache, int page, int kv_head, int p)
        : numbers(const_cast<cache_t*>(cache) + cache_row(page, kv_head, p) * DIM) {}
    __device__ __forceinline__ float operator[](int d) const { return from_cache(numbers[d]); }
    template <int N>
    __device__ __forceinline__ void load(float (&to)[N], int d) const {
        load_cached(to, numbers + d);
    }
    __device__ __forceinline__ void store_all_but_mark(int d, Rounded v) const {
        if (d != SPOILT_KEY_AT) numbers[d] = v.bits;
    }
    __device__ __forceinline__ void store(int d, Rounded v) const { numbers[d] = v.bits; }
    __device__ __forceinline__ void store_mark(mark_t v) const { numbers[SPOILT_KEY_AT] = v; }
};
#endif

// Stores an element of a value; clears `finite` where it is not.
template <int DIM>
DEVICE void store_value(const CachedRow<DIM>& row, int d, Rounded v, bool& finite) {
    const bool here = is_finite(v);
    row.store(d, here ? v : zero_number());
    finite = finite && here;
}
