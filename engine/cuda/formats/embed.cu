// Rows of a packed matrix as float32: token embeddings. Built once per format with FORMAT defined.

// grid (tokens, quads / 4), 128 threads: one warp per 128 columns of one row.
extern "C" __global__ void __launch_bounds__(128)
    JOIN(embed_, FORMAT)(const u8* data, const float* scale, int rows, int columns, const int* token_ids, float* out,
                         int out_stride, float factor) {
    pdl_wait();
    pdl_launch();
    const int lane = threadIdx.x & 31, all = blockIdx.y * 4 + (threadIdx.x >> 5);
    const int k = all * 128 + lane * 4;
    if (k >= columns) return;
    const int token = token_ids[blockIdx.x];
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (token >= 0 && token < rows) {
        const int chunks = (columns + FORMAT::COLUMNS - 1) / FORMAT::COLUMNS;
        const u8* chunk = data + ((i64)(token >> 4) * chunks + all / FORMAT::QUADS) * FORMAT::CHUNK_BYTES;
        const int s = lane >> 3, w = (lane >> 2) & 1, row = (token >> 3) & 1, owner = (token & 7) * 4 + (lane & 3);
        const float undo = FORMAT::HAS_SCALE ? scale[0] : 1.0f;
        Unpack<FORMAT, FORMAT::SCALED>::four(chunk, all % FORMAT::QUADS, s, w, owner, row, undo, v);
    }
    float* at = out + (i64)blockIdx.x * out_stride + k;
    for (int i = 0; i < 4 && k + i < columns; ++i) at[i] = v[i] * factor;
}
