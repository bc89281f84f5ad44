// What the kernels of time mixing share. Needs recurrent.cuh.

// Mean of `size` floats and 1 / their deviation (of all, plus eps), in every lane of the warp.
struct HeadNorm {
    float mean, factor;
};

DEVICE HeadNorm norm_of_head(const float* y, int size, int lane, float eps) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < size; i += WARP) sum = __fadd_rn(sum, y[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(FULL_MASK, sum, offset));
    const float mean = sum / size;
    for (int i = lane; i < size; i += WARP) squares = fmaf(y[i] - mean, y[i] - mean, squares);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares = __fadd_rn(squares, __shfl_xor_sync(FULL_MASK, squares, offset));
    return {mean, 1.0f / sqrtf(squares / size + eps)};
}
