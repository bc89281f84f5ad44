// A range of tiles of a packed matrix as row-major half or float. Built once per format with FORMAT defined.

DEVICE void store_four(u16* at, const float* v, int n) {
    if (n == 4 && ((u64)at & 7) == 0) {
        *(uint2*)at = make_uint2(pack_halves(v[0], v[1]), pack_halves(v[2], v[3]));
    } else {
        for (int i = 0; i < n; ++i) at[i] = float_to_half(v[i]);
    }
}
DEVICE void store_four(float* at, const float* v, int n) {
    if (n == 4 && ((u64)at & 15) == 0) {
        *(float4*)at = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        for (int i = 0; i < n; ++i) at[i] = v[i];
    }
}

// grid (chunks, tiles), 256 threads: warp n does rows n and n + 8 of the tile, 128 contiguous columns at a time.
template <class T>
DEVICE void dequant(const u8* data, const float* scale, T* out, int first_tile, int rows, int columns, int chunks,
                    int paired) {
    const int lane = threadIdx.x & 31, g = threadIdx.x >> 5;
    const u8* chunk = data + ((i64)(first_tile + blockIdx.y) * chunks + blockIdx.x) * FORMAT::CHUNK_BYTES;
    const float undo = FORMAT::HAS_SCALE ? scale[0] : 1.0f;
    const int s = lane >> 3, w = (lane >> 2) & 1;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const i64 local = paired ? (i64)blockIdx.y * 8 + g : (i64)blockIdx.y * 16 + row * 8 + g;
        if (local >= rows) continue;
        T* line = out + ((paired && row ? rows : 0) + local) * columns;
#pragma unroll
        for (int quad = 0; quad < FORMAT::QUADS; ++quad) {
            const int k = blockIdx.x * FORMAT::COLUMNS + quad * 128 + lane * 4;
            if (k >= columns) continue;
            float v[4];
            Unpack<FORMAT, FORMAT::SCALED>::four(chunk, quad, s, w, g * 4 + (lane & 3), row, undo, v);
            store_four(line + k, v, min(4, columns - k));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    JOIN(dequant_half_, FORMAT)(const u8* data, const float* scale, u16* out, int first_tile, int rows, int columns,
                                int chunks, int paired) {
    dequant(data, scale, out, first_tile, rows, columns, chunks, paired);
}
extern "C" __global__ void __launch_bounds__(256)
    JOIN(dequant_float_, FORMAT)(const u8* data, const float* scale, float* out, int first_tile, int rows, int columns,
                                 int chunks, int paired) {
    dequant(data, scale, out, first_tile, rows, columns, chunks, paired);
}
