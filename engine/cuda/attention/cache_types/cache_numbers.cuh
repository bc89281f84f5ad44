// Numbers as the cache holds them: float16, or float32. Define: CACHE_HALF. With CACHE_Q8 the cache holds bytes, of which
// cached_rows.cuh makes numbers.

#ifndef CACHE_Q8
#define CACHE_Q8 0
#endif
#if CACHE_Q8
typedef u8 cache_t;
#elif CACHE_HALF
typedef u16 cache_t;
DEVICE float from_cache(cache_t v) { return half_to_float(v); }
DEVICE cache_t to_cache(float v) { return float_to_half(v); }
#else
typedef float cache_t;
DEVICE float from_cache(cache_t v) { return v; }
DEVICE cache_t to_cache(float v) { return v; }
#endif

#if !CACHE_Q8
// One element, or four that are aligned together.
DEVICE void load_cached(float (&to)[1], const cache_t* from) { to[0] = from_cache(*from); }
DEVICE void load_cached(float (&to)[4], const cache_t* from) {
#if CACHE_HALF
    const uint2 v = *(const uint2*)from;
    to[0] = low_half(v.x), to[1] = high_half(v.x), to[2] = low_half(v.y), to[3] = high_half(v.y);
#else
    const float4 v = *(const float4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
#endif
}
#endif
