// What the kernels of time mixing share. Needs recurrent.cuh.

// Mean of `size` floats and 1 / their deviation (of all, plus eps), in every lane of the warp.
struct HeadNorm {
    float mean, factor;
};

DEVICE HeadNorm norm_of_head(const float* y, int size, int lane, float eps) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < size; i += WARP) sum = __fadd_rn(sum, y[i]);
    const float mean = warp_sum(sum) / size;
    for (int i = lane; i < size; i += WARP) squares = fmaf(y[i] - mean, y[i] - mean, squares);
    return {mean, 1.0f / sqrtf(warp_sum(squares) / size + eps)};
}
