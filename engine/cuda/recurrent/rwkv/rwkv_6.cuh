// What the kernels of RWKV-6's time mixing share. LINEAR: see rwkv_6.cu.

// What is given becomes r, k and w of the formulas.
DEVICE void prepare(float& r, float& k, float& w) {
    w = expf(-expf(w));
    if (LINEAR) {
        k = __fadd_rn(k, -__fmul_rn(k, w));
        r = __fmul_rn(r, 1.0f / sqrtf((float)HEAD));
    }
}
