// Copies that are no part of the model: what the host sends to many places at once, and whole pages of the cache.

struct Record {  // 16 bytes; engine/cuda/staging.py RECORD has the same fields
    u32* to;
    u32 first, count;  // 32-bit words of the data
};

// grid (records): data[first : first + count] goes to `to`. Both arrays are in pinned host memory that the host writes
// anew for every launch, so they are read past all caches.
extern "C" __global__ void __launch_bounds__(256) scatter(const Record* records, const u32* data) {
    const volatile Record* record = records + blockIdx.x;
    u32* to = record->to;
    const u32 first = record->first, count = record->count;
    for (u32 i = threadIdx.x; i < count; i += 256) to[i] = __ldcv(data + first + i);
}

// Pages from one set of arrays to another. grid (pairs, arrays), 256 threads. sources, targets: address of every array;
// page_bytes: size of one of its pages, a multiple of 4; pairs: (page of the source, page of the target).
extern "C" __global__ void __launch_bounds__(256)
    copy_pages(const u64* sources, const u64* targets, const i64* page_bytes, const int2* pairs) {
    const int2 pair = pairs[blockIdx.x];
    const i64 size = page_bytes[blockIdx.y];
    const u8* from = (const u8*)sources[blockIdx.y] + pair.x * size;
    u8* to = (u8*)targets[blockIdx.y] + pair.y * size;
    if (size % 16 == 0) {
        const i64 n = size / 16;
        i64 i = threadIdx.x;
        for (; i + 3 * 256 < n; i += 4 * 256) {  // four on their way at once: the other side may be host memory
            const uint4 a = ((const uint4*)from)[i], b = ((const uint4*)from)[i + 256];
            const uint4 c = ((const uint4*)from)[i + 512], d = ((const uint4*)from)[i + 768];
            ((uint4*)to)[i] = a, ((uint4*)to)[i + 256] = b, ((uint4*)to)[i + 512] = c, ((uint4*)to)[i + 768] = d;
        }
        for (; i < n; i += 256) ((uint4*)to)[i] = ((const uint4*)from)[i];
    } else {
        for (i64 i = threadIdx.x; i < size / 4; i += 256) ((u32*)to)[i] = ((const u32*)from)[i];
    }
}

// grid (rows), 256 threads: out[r] = x[index[r]], rows of `columns` floats.
extern "C" __global__ void __launch_bounds__(256) gather_rows(const float* x, const int* index, float* out, int columns) {
    const float* from = x + (i64)index[blockIdx.x] * columns;
    for (int i = threadIdx.x; i < columns; i += 256) out[(i64)blockIdx.x * columns + i] = from[i];
}
